"""Keys of a text that was read before: block by block, and an even sample of all of them.

In: a store and a layer. Out: keys in near memory, of no more than a block and the sample at once. Keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.per_prompt.sample import add_block, thin_columns
from farkv.store.tiers import BLOCK_TOKENS, Tiers

# Keys of every sequence that a projection is fitted to, at most.
FIT_KEYS = 4096


def read_keys(store: Tiers, layer: int, start: int, stop: int) -> Iterator[tuple[int, Float[Tensor, "B Hkv T D"]]]:
    """Give a layer's stored keys, block by block, each with its first row."""
    n = min(BLOCK_TOKENS, store.block_tokens)
    for first in range(start, stop, n):
        # A deliberate copy where the pool is far: these keys were stored before the index could be built.
        yield first, store.keys(layer, first, min(first + n, stop)).to(store.device)


def sample_keys(
    store: Tiers, layer: int, real: Bool[Tensor, "B S"] | None, n_rows: int
) -> tuple[Float[Tensor, "b Hkv N D"], Bool[Tensor, "B N"] | None]:
    """Return at most FIT_KEYS keys of every sequence's first `n_rows`, evenly spaced, zeros where it has fewer.

    Args:
        real: which of these rows are; None: all.

    Cost: every key read once.
    """
    columns, valid = thin_columns(n_rows, real, FIT_KEYS, store.device)
    sample = torch.empty(0, device=store.device)
    for start, block in read_keys(store, layer, 0, n_rows):
        if start == 0:
            sample = block.new_zeros(*block.shape[:2], columns.shape[1], block.shape[3])
        add_block(sample, columns, start, block)
    return (sample if valid is None else sample.masked_fill(~valid[:, None, :, None], 0)), valid
