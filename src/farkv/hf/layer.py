"""One managed layer of a cache: what Hugging Face asks of a cache layer, handed to the recipe.

In: new K and V. Out: those same K and V; what attention reads besides them is the recipe's business.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.methods.contract import Kernel, Recipe, Step


class FarLayer(_compat.DynamicLayer):
    """One managed layer: routes what Hugging Face asks of a cache layer to the recipe."""

    def __init__(self, layer: int, recipe: Recipe):
        super().__init__()
        self.layer, self.recipe = layer, recipe
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; memory is the store's."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and hand them back unchanged."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.recipe.append(self.layer, key_states, value_states)
        return key_states, value_states

    def attend(self, step: Step, kernel: Kernel) -> object:
        """Let the recipe attend."""
        return self.recipe.attend(self.layer, step, kernel)

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.recipe.store.seen(self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's width, over all tokens seen, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum in tokens, only in bytes."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.recipe.clear(self.layer)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the newest tokens; the number is negative, and a tensor in older releases."""
        n_tokens = -int(tokens_to_remove)
        if n_tokens < 0:
            raise CacheStateError(f"crop: expected a negative number of tokens to remove, got {-n_tokens}")
        if n_tokens > 0 and self.is_initialized:
            self.recipe.crop(n_tokens, self.layer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.get_seq_length() > 0:
            self.recipe.select(beam_idx, self.layer)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.get_seq_length() > 0:
            batch = self.recipe.store.batch(self.layer)
            self.recipe.select(torch.arange(batch).repeat_interleave(repeats), self.layer)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.get_seq_length() > 0:
            batch = self.recipe.store.batch(self.layer)
            # A mask, a slice's result or numbers: indexing a range understands them all.
            self.recipe.select(torch.arange(batch)[indices.cpu()], self.layer)

    def offload(self) -> None:
        """Nothing: the store moves records itself."""

    def prefetch(self) -> None:
        """Nothing: the store moves records itself."""
