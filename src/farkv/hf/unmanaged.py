"""Layers that are left to Hugging Face: the sequences of one continue in another's batch, or in a session.

In: two layers of one model, or a cache's. Out: one that holds both, or what they hold as tensors, and back.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.account import Account
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.layer import FarLayer


def count_unmanaged(layers: dict[int, Any], n_tokens: int) -> dict[int, int]:
    """Return the KV bytes that each of these layers, which have read one token, holds of a context of `n_tokens`."""
    sizes: dict[int, int] = {}
    for i, layer in layers.items():
        parts = [t for t in (getattr(layer, name, None) for name in ("keys", "values")) if isinstance(t, Tensor)]
        rows = _compat.count_unmanaged_rows(layer, n_tokens)
        sizes[i] = sum(t.numel() // t.shape[-2] * t.element_size() for t in parts if t.dim() == 4) * rows
    return sizes


def check_unmanaged(layer: Any) -> None:
    """Raise CacheStateError unless a layer that is left to Hugging Face holds keys and values by token, and no more."""
    plain = isinstance(layer, _compat.DynamicLayer) and not hasattr(layer, "conv_states")
    if not plain or getattr(layer, "record_past", False) or hasattr(layer, "indexer_keys"):
        raise CacheStateError(
            f"join: expected layers of keys and values, got a {type(layer).__name__}; "
            "read both texts as one batch instead"
        )


def reset_unmanaged(layers: list[Any]) -> None:
    """Let layers of keys and values that are left to Hugging Face begin anew: some releases keep rows of zeros."""
    for layer in layers:
        plain = isinstance(layer, _compat.DynamicLayer) and not hasattr(layer, "conv_states")
        if plain and not isinstance(layer, FarLayer) and layer.is_initialized:
            layer.keys = layer.values = None
            layer.is_initialized = False


def join_unmanaged(layer: Any, more: Any) -> None:
    """Join the keys and values of one layer; a sliding one has only the newest."""
    n_tokens = max(layer.get_seq_length(), more.get_seq_length())
    layer.keys, layer.values = join_left(layer.keys, more.keys), join_left(layer.values, more.values)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = n_tokens


def count_reads(layers: list[Any], account: Account) -> None:
    """Count a decode step of the layers that are left to Hugging Face: they read all they hold."""
    for i, layer in enumerate(layers):
        keys = None if isinstance(layer, FarLayer) else getattr(layer, "keys", None)
        if isinstance(layer, FarLayer) or keys is None or keys.dim() != 4:
            continue
        account.record_bytes[i] = (keys.shape[-1] + layer.values.shape[-1]) * keys.element_size()
        held = keys.shape[0] * keys.shape[1] * keys.shape[2]
        account.layer(i).add_read(held, held)


def join_left(rows: Tensor, more: Tensor) -> Tensor:
    """Return both batches, zeros on the left of the shorter one's tokens."""
    n = max(rows.shape[2], more.shape[2])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, n - t.shape[2], 0)) for t in (rows, more)])


def list_unmanaged(layers: list[Any]) -> dict[str, Tensor]:
    """Return what layers that are left to Hugging Face hold, by number and name, in host memory.

    Raises:
        CacheStateError: one holds more than keys and values.
    """
    return {
        f"{i}/{name}": tensor.to("cpu")
        for i, layer in enumerate(layers)
        if not isinstance(layer, FarLayer)
        for name, tensor in _compat.export_state(layer).items()
    }


def take_unmanaged(layers: list[Any], tensors: dict[str, Tensor], like: dict[int, Any], n_tokens: int) -> None:
    """Give them what `list_unmanaged` returned after `n_tokens`.

    Args:
        like: layers of the same model that have read a token.

    Raises:
        SessionError: these are not their keys and values.
    """
    for i, layer in enumerate(layers):
        if not isinstance(layer, FarLayer):
            start = f"{i}/"
            mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            _compat.import_state(layer, mine, like[i], n_tokens)
