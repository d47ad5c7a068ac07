"""One managed layer of a cache: what Hugging Face asks of a cache layer, handed to the engine.

In: new K and V. Out: those same K and V; what attention reads besides them is the engine's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from farkv._axes import Tensor
from farkv.engine.drafted import attend_drafted
from farkv.engine.step import Engine
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.latents import LatentForm
from farkv.math.step import AttentionFunction, Step

ELSEWHERE = (
    "this cache: its records are in far memory, so a layer has no tensors keys and values; use an ordinary cache where "
    "code reads a cache's tensors"
)


class FarLayer(_compat.DynamicLayer):
    """One managed layer: routes what Hugging Face asks of a cache layer to the engine.

    Args:
        latents: the form of what is stored, where it is latents.
    """

    def __init__(self, layer: int, engine: Engine, latents: LatentForm | None = None):
        super().__init__()
        self.layer, self.engine, self.latents = layer, engine, latents
        # Whether what attention is called with was found to be what the stored latents expand to.
        self.is_checked = False
        self.is_initialized = False
        # What `update` handed back in this pass, until attention is called with it.
        self.handed: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Any:
        """Refuse: they are in far memory.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(ELSEWHERE)

    @keys.setter
    def keys(self, value: None) -> None:
        """Nothing: Hugging Face's layers begin with none."""

    @property
    def values(self) -> Any:
        """Refuse, as `keys` does."""
        raise CacheStateError(ELSEWHERE)

    @values.setter
    def values(self, value: None) -> None:
        """Nothing, as of `keys`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; memory is the store's."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and hand them back unchanged."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = key_states, value_states
        if self.latents is not None:
            stored = self.latents.pack(key_states, value_states)
        with out_of_inference():
            self.engine.append(self.layer, *stored)
        return self.hand(key_states, value_states)

    def hand(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was stored, and note it: attention must be called with the same."""
        self.handed = k, v
        return k, v

    def check_handed(self, k: Tensor, v: Tensor) -> None:
        """Raise CacheStateError unless attention is called with the very keys and values that were stored."""
        handed = self.take_handed()
        if handed is None or handed[0] is not k or handed[1] is not v:
            raise self.refuse(f"{describe(k, v)}, the cache got {describe(*handed) if handed else 'none'}")

    def take_handed(self) -> tuple[Tensor, Tensor] | None:
        """Return what `update` handed back in this pass; attention asks once."""
        handed, self.handed = self.handed, None
        return handed

    def refuse(self, found: str) -> CacheStateError:
        """Return the error for a model whose attention is called with something else than the cache got."""
        return CacheStateError(
            f"layer {self.layer}: this model attends to other keys or values than those it gives the cache "
            f"({found}); it cannot be managed, use an ordinary cache"
        )

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Let the engine attend."""
        with out_of_inference():
            if step.n_new > 1 and self.engine.is_drafted(self.layer):
                return join_outputs(attend_drafted(self.engine, self.layer, step, attention))
            return self.engine.attend(self.layer, step, attention)

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.engine.count_tokens(self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's width, over all tokens seen, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum in tokens, only in bytes."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.engine.clear(self.layer)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the newest tokens; the number is negative, and a tensor in older releases."""
        n_tokens = -int(tokens_to_remove)
        if n_tokens < 0:
            raise CacheStateError(f"crop: expected a negative number of tokens to remove, got {-n_tokens}")
        if n_tokens > 0 and self.is_initialized:
            self.engine.crop(self.layer, n_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.get_seq_length() > 0:
            self.engine.select(self.layer, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.get_seq_length() > 0:
            batch = self.engine.count_sequences(self.layer)
            self.engine.select(self.layer, torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.get_seq_length() > 0:
            batch = self.engine.count_sequences(self.layer)
            # A mask, a slice's result or numbers: indexing a range understands them all.
            self.engine.select(self.layer, torch.arange(batch)[indices.cpu()])

    def offload(self) -> None:
        """Nothing: the store moves records itself."""

    def prefetch(self) -> None:
        """Nothing: the store moves records itself."""


def out_of_inference() -> AbstractContextManager[Any]:
    """Leave torch.inference_mode: what is stored in it could not be appended to outside of it."""
    return leave_inference() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def leave_inference() -> Iterator[None]:
    """Leave it, but for gradients, which leaving it alone would turn on."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def join_outputs(outputs: list[Any]) -> Any:
    """Return what Hugging Face's attention returns of several tokens; weights there are none of a choice."""
    return torch.cat([out for out, _ in outputs], dim=1), None


def describe(k: Tensor, v: Tensor) -> str:
    """Return the shapes of keys and values in words."""
    return f"keys {list(k.shape)}, values {list(v.shape)}"
