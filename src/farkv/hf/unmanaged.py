"""Layers that are left to Hugging Face: the sequences of one continue in another's batch.

In: two layers of one model. Out: one that holds both.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat


def check_unmanaged(layer: Any) -> None:
    """Raise CacheStateError unless a layer that is left to Hugging Face holds keys and values by token, and no more."""
    plain = isinstance(layer, _compat.DynamicLayer) and not hasattr(layer, "conv_states")
    if not plain or getattr(layer, "record_past", False) or hasattr(layer, "indexer_keys"):
        raise CacheStateError(
            f"join: expected layers of keys and values, got a {type(layer).__name__}; "
            "read both texts as one batch instead"
        )


def join_unmanaged(layer: Any, more: Any) -> None:
    """Join the keys and values of one layer; a sliding one has only the newest."""
    n_tokens = max(layer.get_seq_length(), more.get_seq_length())
    layer.keys, layer.values = join_left(layer.keys, more.keys), join_left(layer.values, more.values)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = n_tokens


def join_left(rows: Tensor, more: Tensor) -> Tensor:
    """Return both batches, zeros on the left of the shorter one's tokens."""
    n = max(rows.shape[2], more.shape[2])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, n - t.shape[2], 0)) for t in (rows, more)])
