"""Layers that are left to Hugging Face: the sequences of one continue in another's batch, or in a session.

In: two layers of one model, or a cache's. Out: one that holds both, or what they hold as tensors, and back.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.account import Account
from farkv.errors import CacheStateError, SessionError
from farkv.hf import _compat
from farkv.hf.layer import FarLayer
from farkv.hf.state import Mark, check_state, count_rows, export_state, holds_states, import_state


def count_unmanaged(layers: dict[int, Any], n_tokens: int) -> dict[int, int]:
    """Return the KV bytes that each of these layers, which have read one token, holds of a context of `n_tokens`."""
    sizes: dict[int, int] = {}
    for i, layer in layers.items():
        parts = [t for t in (getattr(layer, name, None) for name in ("keys", "values")) if isinstance(t, Tensor)]
        rows = count_rows(layer, n_tokens)
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


def pair_unmanaged(mine: list[Any], theirs: list[Any]) -> list[tuple[Any, Any]]:
    """Return the layers of two caches that are left to Hugging Face, in pairs.

    Raises:
        CacheStateError: some hold more than keys and values.
    """
    pairs = [pair for pair in zip(mine, theirs, strict=True) if not isinstance(pair[0], FarLayer)]
    for pair in pairs:
        for layer in pair:
            check_unmanaged(layer)
    return pairs


def join_unmanaged(layer: Any, more: Any) -> None:
    """Join the keys and values of one layer; a sliding one has only the newest."""
    n_tokens = max(layer.get_seq_length(), more.get_seq_length())
    layer.keys, layer.values = join_left(layer.keys, more.keys), join_left(layer.values, more.values)
    if hasattr(layer, "cumulative_length"):
        # What left the window of one is not what left that of the other.
        layer.cumulative_length, layer.older = n_tokens, None


def count_reads(layers: list[Any], account: Account) -> None:
    """Count the decode steps of a pass of the layers that are left to Hugging Face: they read all they hold."""
    for i, layer in enumerate(layers):
        keys = None if isinstance(layer, FarLayer) else getattr(layer, "keys", None)
        if isinstance(layer, FarLayer) or keys is None or keys.dim() != 4:
            continue
        account.record_bytes[i] = (keys.shape[-1] + layer.values.shape[-1]) * keys.element_size()
        # While steps are recorded to be taken back, a window holds more than one of them reads.
        rows = count_rows(layer, keys.shape[2])
        held = account.pass_steps * keys.shape[0] * keys.shape[1] * rows
        account.layer(i).add_read(held, held)


def join_left(rows: Tensor, more: Tensor) -> Tensor:
    """Return both batches, zeros on the left of the shorter one's tokens."""
    n = max(rows.shape[2], more.shape[2])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, n - t.shape[2], 0)) for t in (rows, more)])


def list_unmanaged(layers: list[Any], marked: Mark | None) -> dict[str, Tensor]:
    """Return what layers that are left to Hugging Face hold, and held before, as a session names it, in host memory.

    Raises:
        CacheStateError: of one it is not known what it holds.
    """
    held = {i: export_state(layer) for i, layer in enumerate(layers) if not isinstance(layer, FarLayer)}
    parts = {"unmanaged": held, "marked": {} if marked is None else marked.states}
    return {
        f"{part}/{i}/{name}": tensor.to("cpu")
        for part, states in parts.items()
        for i, state in states.items()
        for name, tensor in state.items()
    }


def take_marked(layers: list[Any], tensors: dict[str, Tensor], like: dict[int, Any], at: object, n_tokens: int) -> Mark:
    """Return the states that were noted, as `list_unmanaged` lists them, checked; as `take_unmanaged`.

    Args:
        at: the tokens after which they were noted, as a session says.

    Raises:
        SessionError: these are not states of these layers.
    """
    if type(at) is not int or not 0 < at <= n_tokens:
        raise SessionError(f"its marked: {at!r}, expected a number of its {n_tokens} tokens; make it anew")
    states: dict[int, dict[str, Tensor]] = {}
    for i, layer in enumerate(layers):
        if holds_states(layer):
            states[i] = take_names(tensors, f"{i}/")
            check_state(layer, states[i], like[i], at)
    if not states:
        raise SessionError(f"its marked: {at}, and no layer of this model holds states; make it anew")
    return Mark(at, states)


def take_names(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `start`, without it."""
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def take_unmanaged(layers: list[Any], tensors: dict[str, Tensor], like: dict[int, Any], n_tokens: int) -> None:
    """Give them what `list_unmanaged` returned after `n_tokens`.

    Args:
        like: layers of the same model that have read a token.

    Raises:
        SessionError: these are not their keys and values.
    """
    for i, layer in enumerate(layers):
        if not isinstance(layer, FarLayer):
            import_state(layer, take_names(tensors, f"{i}/"), like[i], n_tokens)
