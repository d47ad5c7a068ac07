"""The sequences of one cache continue in another's batch.

In: two caches of one attached model. Out: one that holds both; the other is empty.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.cache import FarCache, FarLayer
from farkv.methods.join import join_recipes


def join_caches(cache: FarCache, other: FarCache) -> None:
    """Join two caches, the layers that are left to Hugging Face too."""
    for each in (cache, other):
        each.settle()
        each.check_whole()
    if cache.identity != other.identity:
        raise CacheStateError("join: the caches are of different models; expected one attached model's")
    mine: list[Any] = cache.layers
    theirs: list[Any] = other.layers
    stock = [pair for pair in zip(mine, theirs, strict=True) if not isinstance(pair[0], FarLayer)]
    for layer in (layer for pair in stock for layer in pair):
        check_stock(layer)
    join_recipes(cache.recipe, other.recipe)
    for layer, more in stock:
        join_stock(layer, more)
    other.reset()


def check_stock(layer: Any) -> None:
    """Raise CacheStateError unless a layer that is left to Hugging Face holds keys and values by token, and no more."""
    plain = isinstance(layer, _compat.DynamicLayer) and not hasattr(layer, "conv_states")
    if not plain or getattr(layer, "record_past", False) or hasattr(layer, "indexer_keys"):
        raise CacheStateError(
            f"join: expected layers of keys and values, got a {type(layer).__name__}; "
            "read both texts as one batch instead"
        )


def join_stock(layer: Any, more: Any) -> None:
    """Join the keys and values of one layer; a sliding one has only the newest."""
    n_tokens = max(layer.get_seq_length(), more.get_seq_length())
    layer.keys, layer.values = join_left(layer.keys, more.keys), join_left(layer.values, more.values)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = n_tokens


def join_left(rows: Tensor, more: Tensor) -> Tensor:
    """Return both batches, zeros on the left of the shorter one's tokens."""
    n = max(rows.shape[2], more.shape[2])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, n - t.shape[2], 0)) for t in (rows, more)])
