"""The inputs of one attention call: the new tokens' queries, keys and values, and the model's attention function.

Made by whatever runs the model (`hf/`), read by the engine and by methods. Knows no cache.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from farkv._axes import Bool, Float, Tensor
from farkv.math.logits import Logits


class Query(NamedTuple):
    """Post-RoPE queries, and how their logits are formed."""

    q: Float[Tensor, "B Hq T D"]
    logits: Logits


class Step(NamedTuple):
    """One attention call. The mask is over the whole context, True where a query may see a token; None: causal."""

    query: Query
    k: Float[Tensor, "B Hkv T D"]
    v: Float[Tensor, "B Hkv T Dv"]
    mask: Bool[Tensor, "b 1 T S"] | None

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
        return (self.k.numel() + self.v.numel()) * self.k.element_size()


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
