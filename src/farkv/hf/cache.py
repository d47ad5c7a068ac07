"""The cache that a user passes as `past_key_values`: Hugging Face's face of an engine.

In: new K and V per layer. Out: those same K and V; what attention reads besides them is the engine's business.
Lengths are logical (tokens seen). The cache holds no model, hook or stream, so it can be deep-copied.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.engine.join import join_engines
from farkv.engine.step import Engine
from farkv.engine.undo import State, note_state, restore_state
from farkv.errors import CacheStateError, FarKVError
from farkv.hf import _compat
from farkv.hf.identity import identify_tokenizer
from farkv.hf.layer import FarLayer
from farkv.hf.unmanaged import check_unmanaged, join_unmanaged, list_unmanaged
from farkv.session.save import save_text


class Before(NamedTuple):
    """What a pass finds: enough to take it back."""

    tokens: int
    # Of layers that are left to Hugging Face: their attributes.
    unmanaged: dict[int, dict[str, Any]]
    state: State


class Outer(NamedTuple):
    """A module around the one that reads; the identity, not the module: a cache must not hold a model."""

    module: int
    started: float
    ids: Tensor | None


class FarCache(_compat.Cache):
    """All layers of one context; pass it as `past_key_values`. Made by `new_cache()` of an attached model."""

    def __init__(
        self, layers: list[Any], engine: Engine, *, identity: dict[str, str] | None = None, verify_steps: int = 0
    ):
        super().__init__(layers=layers)
        self.engine, self.account = engine, engine.account
        # Decode steps that are still to be compared with full attention.
        self.verify_steps = verify_steps
        # What was read, token by token, where ids are known.
        self._ids: list[Tensor] = []
        self._n_ids = 0
        self.identity = identity or {}
        self._before: Before | None = None
        self._is_reading = False
        self._outer: Outer | None = None
        self._started = self._seconds = 0.0
        self._broken = ""

    @property
    def token_ids(self) -> Int[Tensor, " N"]:
        """Return the ids of the tokens that the first sequence has read, in host memory."""
        ids = torch.cat(self._ids) if self._ids else torch.empty(0, dtype=torch.long)
        return ids[: self.get_seq_length()].to("cpu")

    def save(self, path: str | Path, *, tokenizer: Any = None, text: str = "") -> None:
        """Write the text that this cache has read to a session file; see `farkv.load_cache`.

        Args:
            tokenizer: whose tokens they are; compared when the session is loaded with one.
            text: the text itself, where it is known.

        Raises:
            CacheStateError: this cache does not hold one whole, unpadded text.
            SessionError, StoreError: the file cannot be written; what was there before still is.
        """
        self.settle()
        self.check_whole()
        versions = {"farkv": version("farkv"), "transformers": _compat.version}
        model = {"identity": self.identity, "tokenizer": identify_tokenizer(tokenizer), "versions": versions}
        others = {f"unmanaged/{name}": tensor for name, tensor in list_unmanaged(self.layers).items()}
        save_text(Path(path), self.engine, self.token_ids, text, model, others)

    def take_text(self, ids: Int[Tensor, " N"], dtype: torch.dtype, device: torch.device) -> None:
        """Note the tokens of a text that was read before; the engine holds its records."""
        self._ids, self._n_ids = [ids], len(ids)
        self.account.context_tokens = len(ids)
        for layer in self.layers:
            if isinstance(layer, FarLayer):
                layer.dtype, layer.device, layer.is_initialized = dtype, device, True

    def join(self, other: FarCache) -> None:
        """Let the sequences of another cache continue in this one's batch; shorter ones are padded on the left.

        They come behind this one's own. From then on `attention_mask` says what is padding, as for any padded batch.
        `other` is empty afterwards.

        Raises:
            CacheStateError: they are not of one model, method and limits, or not all their records are in memory.
            CapacityError: a limit cannot hold both; nothing has changed.

        Cost: one copy of all records of both, a layer at a time.
        """
        for each in (self, other):
            each.settle()
            each.check_whole()
        if self.identity != other.identity:
            raise CacheStateError("join: the caches are of different models; expected one attached model's")
        mine: list[Any] = self.layers
        theirs: list[Any] = other.layers
        unmanaged = [pair for pair in zip(mine, theirs, strict=True) if not isinstance(pair[0], FarLayer)]
        for layer in (layer for pair in unmanaged for layer in pair):
            check_unmanaged(layer)
        join_engines(self.engine, other.engine)
        for layer, more in unmanaged:
            join_unmanaged(layer, more)
        other.reset()
        # Of several texts none is the cache's own.
        self._ids, self._n_ids = [], 0

    def note_tokens(self, ids: Tensor | None) -> None:
        """Note the ids of the pass that begins; without them what is cached is no text that can be saved."""
        n = self.get_seq_length()
        if self._n_ids > n:
            self._ids, self._n_ids = [torch.cat(self._ids)[:n]], n
        if ids is not None:
            self._ids.append(ids[0].detach())
            self._n_ids += ids.shape[1]

    def begin(self, module: object, n_new: int, ids: Tensor | None, *, reads: bool) -> None:
        """Note that a forward pass over `n_new` tokens starts.

        Args:
            reads: this module's pass is what stores the tokens; another one holds such a pass.

        Raises:
            CacheStateError: a pass failed half way before, and what it had stored cannot be taken back.
        """
        now = time.perf_counter()
        if not reads:
            self._outer = Outer(id(module), now, ids)
            return
        self.settle()
        self.check_whole()
        self._before, self._is_reading, self._started = self._note(), True, now
        if ids is None and self._outer is not None:
            # A decoder is often called with the embeddings of the tokens that the whole model was called with.
            given = self._outer.ids
            ids = given if given is not None and given.shape[1] == n_new else None
        self.note_tokens(ids)
        self.account.decoding = n_new == 1 and self._before.tokens > 0

    def _note(self) -> Before:
        layers: list[Any] = self.layers
        # Layers of keys and values get new tensors in every pass: what they hold now stays as it is.
        unmanaged = {
            i: dict(vars(layer))
            for i, layer in enumerate(layers)
            if not isinstance(layer, FarLayer) and not hasattr(layer, "conv_states")
        }
        return Before(self.get_seq_length(), unmanaged, note_state(self.engine))

    def settle(self) -> None:
        """Take back a pass that ended with neither output nor exception: it was killed, by Ctrl-C for example."""
        if self._is_reading:
            self.take_back()

    def take_back(self) -> None:
        """Forget the tokens of a pass that failed: what was there before it is there after it."""
        before = self._before
        if before is not None:
            # First: if this is interrupted, by Ctrl-C too, no later pass may continue from a half-undone state.
            self._broken = "a pass failed, and taking it back failed too"
        self._before, self._is_reading = None, False
        if before is not None:
            self._broken = self._undo(before)

    def _undo(self, before: Before) -> str:
        """Put everything back to what a pass found; return what cannot be."""
        # What was on its way near must not arrive in the middle of the next pass.
        self.engine.wait()
        layers: list[Any] = self.layers
        broken = ""
        for i, layer in enumerate(layers):
            if isinstance(layer, FarLayer):
                n_new = layer.get_seq_length() - before.tokens
                broken = (self._crop_layer(i, n_new) if n_new > 0 else "") or broken
            elif i in before.unmanaged:
                vars(layer).clear()
                vars(layer).update(before.unmanaged[i])
            else:
                # Linear attention writes its states in place.
                broken = self._describe_stuck(i)
        restore_state(self.engine, before.state)
        return broken

    def step_back(self, n_tokens: int) -> None:
        """Forget the newest tokens of every layer.

        Raises:
            CacheStateError: a layer cannot: what came before them is gone.
        """
        self.settle()
        self.check_whole()
        self._broken, broken = "stepping back was stopped half way", ""
        for i in range(len(self.layers) if n_tokens else 0):
            broken = self._crop_layer(i, n_tokens) or broken
        self._broken = broken
        self.check_whole()

    def _crop_layer(self, i: int, n_tokens: int) -> str:
        """Forget a layer's newest tokens; return why it cannot."""
        layers: list[Any] = self.layers
        try:
            layers[i].crop(-n_tokens)
        except (FarKVError, ValueError, RuntimeError, AttributeError):
            return self._describe_stuck(i)
        return ""

    def _describe_stuck(self, i: int) -> str:
        return f"some were to be forgotten and layer {i} ({type(self.layers[i]).__name__}) cannot step back"

    def check_whole(self) -> None:
        """Raise CacheStateError where layers hold different tokens."""
        why, uneven = self._broken, self.engine.find_uneven()
        if not why and len(uneven) > 1:
            first, other = ((i, self.engine.count_tokens(i)) for i in uneven[:2])
            why = f"layer {first[0]} holds {first[1]} and layer {other[0]} holds {other[1]}"
        if why:
            raise CacheStateError(
                f"this cache: expected all layers to hold the same tokens, but {why}; start a new cache"
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._ids, self._n_ids, self._broken = [], 0, ""
        self._before, self._is_reading = None, False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the newest tokens, in the form of the transformers release in use."""
        self.settle()
        super().crop(*args, **kwargs)

    def end(self, module: object, *, reads: bool, failed: bool) -> None:
        """Count the forward pass that ends; verified steps are not timed. What a failed one stored is taken back."""
        now, outer = time.perf_counter(), self._outer
        if not reads:
            if outer is None or outer.module != id(module):
                return
            self._outer = None
            if failed:
                self.take_back()
            elif self._before is not None:
                self._add_seconds(now - outer.started - self._seconds)
        elif failed:
            self.take_back()
        elif self._is_reading:
            self._is_reading = False
            self._count_pass(now - self._started)
        if not reads or outer is None:
            self._before = None

    def _count_pass(self, seconds: float) -> None:
        self.account.context_tokens = self.get_seq_length()
        self._seconds = seconds
        self._add_seconds(seconds)
        if self.account.decoding:
            self.account.decode_steps += 1
            self.account.timed_steps += not self.engine.mode.measures
            self._count_unmanaged_layers()

    def _add_seconds(self, seconds: float) -> None:
        if not self.account.decoding:
            self.account.prefill_s += seconds
        elif not self.engine.mode.measures:
            self.account.decode_s += seconds

    def _count_unmanaged_layers(self) -> None:
        """Layers left to Hugging Face read all they hold."""
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            keys = getattr(layer, "keys", None)
            if isinstance(layer, FarLayer) or keys is None or keys.dim() != 4:
                continue
            self.account.record_bytes[i] = (keys.shape[-1] + layer.values.shape[-1]) * keys.element_size()
            held = keys.shape[0] * keys.shape[1] * keys.shape[2]
            self.account.layer(i).add_read(held, held)
