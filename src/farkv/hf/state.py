"""Cache layers that are left to Hugging Face: what they hold, as tensors and back, and how they step back a little.

In: a layer of keys and values, or of states (linear attention, convolutions). Out: its tensors by name; a new layer
that holds them. Layers of a window keep a few tokens more than it; states cannot step back, but return to what they
were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from farkv._axes import Tensor
from farkv.errors import CacheStateError, SessionError
from farkv.hf import _compat

# Tokens at a text's end that may come out otherwise when something follows it; every layer can step back so far.
MOST_SHARED = 16


class SlidingLayer(_compat.DynamicSlidingWindowLayer):
    """Hugging Face's layer of a window, which also holds the MOST_SHARED tokens before it: it can step back so far.

    `keys`, `values`, and what attention gets, are those of Hugging Face's own, bit for bit.
    """

    def __init__(self, sliding_window: int, **kwargs: Any):
        super().__init__(sliding_window=sliding_window, **kwargs)
        # Of the tokens that left the window last.
        self.older: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens, as Hugging Face's layer does; keep a few of those that leave the window.

        Cost: a copy of MOST_SHARED tokens besides Hugging Face's own of the window.
        """
        full = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            # Hugging Face's layer holds what it needs to step back by itself.
            self.older = None
            return full
        gone = full[0].shape[-2] - self._held()[0].shape[-2]
        if gone > 0:
            older = self.older or tuple(rows[..., :0, :] for rows in full)
            keys, values = (
                # A copy: a view would keep all the rest of a prompt.
                torch.cat([old, rows[..., max(0, gone - MOST_SHARED) : gone, :]], -2)[..., -MOST_SHARED:, :]
                for old, rows in zip(older, full, strict=True)
            )
            self.older = keys, values
        return full

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the newest tokens; the number is negative.

        Raises:
            RuntimeError: they are more than MOST_SHARED, of a window that was full.
        """
        n = -int(tokens_to_remove)
        if self.record_past or n <= 0 or self.cumulative_length < self.sliding_window:
            # A number: of a tensor older releases make a length that changes where others hold it.
            super().crop(-n)
            return
        held = self._held()
        older = self.older or tuple(rows[..., :0, :] for rows in held)
        keys, values = (torch.cat(parts, -2) for parts in zip(older, held, strict=True))
        stop = keys.shape[-2] - n
        start = stop - count_rows(self, self.cumulative_length - n)
        if start < 0:
            raise RuntimeError(f"crop: expected at most the {older[0].shape[-2]} tokens before the window, got {n}")
        self.older = keys[..., :start, :], values[..., :start, :]
        self.keys, self.values = keys[..., start:stop, :], values[..., start:stop, :]
        self.cumulative_length -= n

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        # Some releases keep rows of zeros.
        self.keys = self.values = self.older = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._select_older(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        if self.older is not None:
            self._select_older(torch.arange(self.older[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._select_older(indices)

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _select_older(self, indices: Tensor) -> None:
        if self.older is not None:
            keys, values = (rows[indices.to(rows.device)] for rows in self.older)
            self.older = keys, values


# Of these it is known what they hold.
KINDS = (_compat.DynamicLayer, _compat.DynamicSlidingWindowLayer, SlidingLayer, _compat.LinearAttentionLayer)


def make_unmanaged_layer(layer_type: str, arguments: dict[str, Any]) -> Any:
    """Make Hugging Face's own cache layer of a type, or one of ours that is the same and can step back a little."""
    made = _compat.find_layer_class(layer_type)
    return (SlidingLayer if made is _compat.DynamicSlidingWindowLayer else made)(**arguments)


def holds_states(layer: Any) -> bool:
    """Say whether a layer holds states, which are written in place and cannot step back."""
    return hasattr(layer, "conv_states")


def count_rows(layer: Any, n_tokens: int) -> int:
    """Return how many tokens' keys an unmanaged layer needs after `n_tokens`: of a window all but the oldest."""
    window = getattr(layer, "sliding_window", None)
    return n_tokens if window is None else min(n_tokens, max(1, window - 1))


def export_state(layer: Any) -> dict[str, Tensor]:
    """Return what a cache layer of its own still needs, and what it steps back with; nothing where it holds nothing.

    Raises:
        CacheStateError: it is of a kind of which that is not known.
    """
    if type(layer) not in KINDS:
        raise CacheStateError(
            f"save: expected cache layers of keys and values or of states, got a {type(layer).__name__}, which no "
            "session can hold; this model's caches cannot be saved"
        )
    if holds_states(layer):
        named = {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
        return {f"{name}/{i}": t for name, states in named.items() for i, t in states.items() if t is not None}
    if layer.keys is None or not layer.get_seq_length():
        return {}
    n = count_rows(layer, layer.get_seq_length())
    # While steps are recorded to be taken back, it holds more.
    state = {"keys": layer.keys[:, :, -n:], "values": layer.values[:, :, -n:]}
    if (older := getattr(layer, "older", None)) is not None and older[0].shape[-2]:
        state |= {"older_keys": older[0], "older_values": older[1]}
    return state


def import_state(layer: Any, tensors: dict[str, Tensor], like: Any, n_tokens: int) -> None:
    """Give a new cache layer of its own what `export_state` returned of one that had read `n_tokens`.

    Args:
        like: a layer of the same model that has read a token.

    Raises:
        SessionError: this is not what such a layer holds.
    """
    check_state(layer, tensors, like, n_tokens)
    if not tensors:
        return
    if holds_states(layer):
        set_states(layer, tensors, like)
        return
    there = {name: t.to(like.keys.device) for name, t in tensors.items()}
    layer.lazy_initialization(there["keys"], there["values"])
    layer.keys, layer.values = there["keys"], there["values"]
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = n_tokens
    if "older_keys" in there:
        layer.older = there["older_keys"], there["older_values"]


def check_state(layer: Any, tensors: dict[str, Tensor], like: Any, n_tokens: int) -> None:
    """Raise SessionError unless these are what such a layer holds after `n_tokens`; as `import_state`."""
    # Of the tokens before a window there may be fewer, or none: nothing but stepping back needs them.
    older = tensors.get("older_keys")
    expected = describe_state(layer, like, n_tokens, older.shape[-2] if older is not None and older.dim() == 4 else 0)
    got = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if got != expected:
        raise SessionError(f"a {type(layer).__name__} holds {expected}, got {got}; make the session anew")


def describe_state(
    layer: Any, like: Any, n_tokens: int, n_older: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of what a layer holds after `n_tokens`, as one that has read a token shows them.

    Args:
        n_older: tokens before a window that it says it holds.
    """
    if type(layer) not in KINDS:
        return {}
    if holds_states(layer):
        return {name: (tuple(t.shape), t.dtype) for name, t in export_state(like).items()}
    if getattr(like, "keys", None) is None:
        return {}
    n = count_rows(layer, n_tokens)
    rows, before = {"keys": n, "values": n}, min(n_older, MOST_SHARED, n_tokens - n)
    if isinstance(layer, SlidingLayer) and before > 0:
        rows |= {"older_keys": before, "older_values": before}
    pairs = {"keys": like.keys, "values": like.values}
    forms = {name: pairs[name.removeprefix("older_")] for name in rows}
    return {name: ((1, t.shape[1], rows[name], t.shape[3]), t.dtype) for name, t in forms.items()}


def set_states(layer: Any, tensors: dict[str, Tensor], like: Any) -> None:
    """Give a layer of states those that `export_state` returned."""
    device = next(iter(export_state(like).values())).device
    for name, tensor in tensors.items():
        kind, _, number = name.partition("/")
        i, state = int(number), tensor.to(device)
        layer.lazy_initialization(**{f"{kind}_states": state}, state_idx=i)
        getattr(layer, f"{kind}_states")[i].copy_(state)
        layer.has_previous_state[i] = True


class Mark(NamedTuple):
    """What the layers of states held after `tokens` tokens, by layer and name."""

    tokens: int
    states: dict[int, dict[str, Tensor]]


def note_states(layers: list[Any], n_tokens: int) -> Mark | None:
    """Return copies of the states after `n_tokens`; None where no layer has one, or one is of an unknown kind.

    Cost: a copy of all states.
    """
    held = {i: layer for i, layer in enumerate(layers) if holds_states(layer)}
    if not held or not n_tokens or any(type(layer) not in KINDS for layer in held.values()):
        return None
    copies = {i: {name: t.clone() for name, t in export_state(layer).items()} for i, layer in held.items()}
    return Mark(n_tokens, copies)


def put_back(layer: Any, states: dict[str, Tensor]) -> None:
    """Let a layer hold the states that were noted."""
    for name, state in states.items():
        kind, _, number = name.partition("/")
        getattr(layer, f"{kind}_states")[int(number)].copy_(state)
