"""The inputs of one attention call: the new tokens' queries, keys and values, and the model's attention function.

Made by whatever runs the model (`hf/`), read by the engine and by methods. Knows no cache.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from farkv._axes import Bool, Float, Shaped, Tensor
from farkv.math.logits import Logits


class Query(NamedTuple):
    """Post-RoPE queries, and how their logits are formed."""

    q: Float[Tensor, "B Hq T D"]
    logits: Logits


class OwnChoice(NamedTuple):
    """What a model's own indexer did to a step's mask.

    seen: the mask before it chose: what is no padding.  chosen: all that it chose, where some of it went for a cap;
    None: the step's mask is that.
    """

    seen: Shaped[Tensor, "b h T S"] | None
    chosen: Bool[Tensor, "B 1 T S"] | None = None


class Step(NamedTuple):
    """One attention call.

    mask: over the whole context, [b, 1, T, S], True where a query may see a token; None: causal. One that differs from
    head to head, or of numbers that are added to logits, has a bias: only the model's own attention reads by it.
    own: of a model whose own indexer has chosen among what the mask shows; None: it has none.
    in_keys: values are the first numbers of keys, and are stored with them: latents.
    """

    query: Query
    k: Float[Tensor, "B Hkv T D"]
    v: Float[Tensor, "B Hkv T Dv"]
    mask: Shaped[Tensor, "b h T S"] | None
    in_keys: bool = False
    own: OwnChoice | None = None

    @property
    def seen(self) -> Shaped[Tensor, "b h T S"] | None:
        """Return the mask that says what is padding, whatever the model's own indexer chose."""
        return self.mask if self.own is None else self.own.seen

    @property
    def plain_mask(self) -> Shaped[Tensor, "b h T S"] | None:
        """Return the mask that the plain model attends by: its own indexer's whole choice."""
        return self.mask if self.own is None or self.own.chosen is None else self.own.chosen

    @property
    def has_bias(self) -> bool:
        """Whether the mask is more than which tokens all heads see."""
        return self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape[1] != 1)

    @property
    def n_new(self) -> int:
        """Return the number of new tokens."""
        return self.k.shape[2]

    @property
    def n_groups(self) -> int:
        """Return the query heads that share a KV head."""
        return self.query.q.shape[1] // self.k.shape[1]

    @property
    def new_bytes(self) -> int:
        """Return the bytes of the new tokens' keys and values."""
        return (self.k.numel() + self.stored_v.numel()) * self.k.element_size()

    @property
    def stored_v(self) -> Tensor:
        """Return the new tokens' values as they are stored: of no width where they are part of keys."""
        return self.v[..., :0] if self.in_keys else self.v

    def values_of(self, k: Tensor, v: Tensor) -> Tensor:
        """Return the values of stored records."""
        return k[..., : self.v.shape[-1]] if self.in_keys else v


def describe_bias(step: Step) -> str:
    """Return why a mask with a bias cannot be followed where not all records are read as they are."""
    assert step.mask is not None
    form = "a mask of its own for every head" if step.mask.dtype == torch.bool else "numbers that are added to logits"
    return (
        f"attention mask: expected which tokens are seen, the same for all heads, got {form} "
        f"({list(step.mask.shape)}, {str(step.mask.dtype).removeprefix('torch.')}); use Full() without near, disk "
        "and quant limits, which reads every record by the model's own attention"
    )


@runtime_checkable
class AttentionFunction(Protocol):
    """The model's own attention, and what a kernel needs to replace it."""

    @property
    def sinks(self) -> Float[Tensor, " Hq"] | None:
        """Return the learned logits that only add to the denominator, None where the model has none."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> object:
        """Attend to the given records; the output has the model's own form."""
        ...

    def wrap(self, out: Float[Tensor, "B Hq T Dv"]) -> object:
        """Give an output that was computed elsewhere the form that a call returns."""
        ...
