"""The cache that a user passes as `past_key_values`: Hugging Face's face of an engine.

In: new K and V per layer. Out: those same K and V; what attention reads besides them is the engine's business.
Lengths are logical (tokens seen). The cache holds no model, hook or stream, so it can be deep-copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from farkv._axes import Int, Tensor
from farkv.engine.join import join_engines
from farkv.engine.step import Engine
from farkv.errors import CacheStateError, FarKVError
from farkv.hf import _compat
from farkv.hf.identity import identify_tokenizer
from farkv.hf.layer import FarLayer
from farkv.hf.owner import Owner
from farkv.hf.read_ids import ReadIds
from farkv.hf.state import Mark, holds_states, note_states, put_back
from farkv.hf.transaction import Pass, describe_stuck, find_fault, note_pass, undo_pass
from farkv.hf.unlike import Unlike
from farkv.hf.unmanaged import count_reads, join_unmanaged, list_unmanaged, pair_unmanaged, reset_unmanaged
from farkv.session.save import save_text


class FarCache(Unlike, _compat.Cache):
    """All layers of one context; pass it as `past_key_values`. Made by `new_cache()` of an attached model."""

    def __init__(
        self, layers: list[Any], engine: Engine, *, made_by: int = -1, identity: dict[str, str] | None = None,
        verify_steps: int = 0,
    ):  # fmt: skip
        super().__init__(layers=layers)
        # The handle whose passes it takes; whether one had positions of an image, which no session holds.
        self.made_by, self.has_positions = made_by, False
        self.engine, self.account = engine, engine.account
        # Decode steps that are still to be compared with full attention.
        self.verify_steps = verify_steps
        self.read_ids = ReadIds()
        # What layers that cannot step back held some tokens ago.
        self.marked: Mark | None = None
        self.identity = identity or {}
        self.owner = Owner()
        # The pass that is neither committed nor undone; why none may go on from what the cache holds.
        self._pass: Pass | None = None
        self._broken = ""

    @property
    def token_ids(self) -> Int[Tensor, " N"]:
        """Return the ids of the tokens that the first sequence has read, in host memory."""
        return self.read_ids.get(self.get_seq_length())

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
        if self.has_positions:
            raise CacheStateError("save: this text has an image, whose positions no session holds; ask it here")
        versions = {"farkv": version("farkv"), "transformers": _compat.version}
        model = {"identity": self.identity, "tokenizer": identify_tokenizer(tokenizer), "versions": versions}
        model |= {} if self.marked is None else {"marked": self.marked.tokens}
        save_text(Path(path), self.engine, self.token_ids, text, model, list_unmanaged(self.layers, self.marked))

    def mark(self) -> None:
        """Note the states of layers that can step back to here and no other way; the cost is a copy of them."""
        self.settle()
        self.marked = note_states(self.layers, self.get_seq_length())

    def take_text(self, ids: Int[Tensor, " N"], dtype: torch.dtype, device: torch.device) -> None:
        """Note the tokens of a text that was read before; the engine holds its records."""
        self.read_ids.take(ids)
        self.account.context_tokens = self.account.session_tokens = len(ids)
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
        unmanaged = pair_unmanaged(self.layers, other.layers)
        join_engines(self.engine, other.engine)
        for layer, more in unmanaged:
            join_unmanaged(layer, more)
        other.reset()
        # Of several texts none is the cache's own.
        self.read_ids.clear()
        self.marked = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen; those of a pass that is not over do not count, it may yet be taken back."""
        found = self._pass
        return super().get_seq_length(layer_idx) if layer_idx or found is None else found.tokens

    # --- a pass -----------------------------------------------------------------------------------------------

    def begin(self, module: object, n_new: int, ids: Tensor | None, *, reads: bool) -> None:
        """Note that a pass over `n_new` tokens starts; one that was stopped before is taken back first.

        Args:
            reads: this module's pass is what stores the tokens; another one holds such a pass.

        Raises:
            CacheStateError: a pass failed half way before, and what it had stored cannot be taken back; or another
                thread uses this cache.
        """
        self.owner.check()
        now, found = time.perf_counter(), self._pass
        if found is None or not (reads and found.is_around(ids)):
            self.settle()
            self.check_whole()
            self.engine.set_mode()
            self.engine.make_room(n_new)
            tokens = self.get_seq_length()
            self._pass = found = note_pass(self.layers, self.engine, tokens, module=id(module), ids=ids, now=now)
        if not reads:
            return
        found.stage = "reading"
        if ids is None and found.ids is not None and found.ids.shape[1] == n_new:
            # A decoder is often called with the embeddings of the tokens that the whole model was called with.
            ids = found.ids
        self.read_ids.note(ids, self.get_seq_length())
        self.engine.begin_pass(n_new, found.tokens)

    def restart_clock(self) -> None:
        """Count the pass's seconds from now on."""
        assert self._pass is not None
        self._pass.started = time.perf_counter()

    def settle(self) -> None:
        """Take back a pass that ended with neither output nor exception, by Ctrl-C for example; raises as `begin`."""
        self.owner.check()
        if self._pass is not None:
            self.take_back()

    def take_back(self) -> None:
        """Forget the tokens of a pass that failed: what was there before it is there after it.

        Where this is stopped too, the next pass tries again: until all is undone, none goes on.

        Raises:
            CacheStateError: what was there before is gone.
        """
        found = self._pass
        if found is None:
            return
        if not self._broken:
            self._broken = "a pass failed, and taking it back failed too"
        try:
            undo_pass(self.layers, self.engine, found)
        except Exception as error:
            self._broken = f"a pass failed, and cannot be taken back ({error})"
            raise CacheStateError(self._describe_broken()) from error
        self._pass, self._broken = None, ""

    def end(self, module: object, *, reads: bool, failed: bool) -> None:
        """Commit the forward pass that ends, or take it back where it failed; verified steps are not timed."""
        found = self._pass
        if found is None or not self.owner.is_here():
            return
        if failed:
            # Where that fails too, the cache knows, and the next pass says so; the error on its way matters more.
            if not self._broken:
                with suppress(CacheStateError):
                    self.take_back()
            return
        if reads:
            found.stage = "read"
        if found.module != id(module):
            return
        if found.stage == "read":
            # Where this fails, the pass is still there to be taken back.
            self.engine.commit()
        self._pass = None
        if found.stage == "read":
            self.account.context_tokens = self.get_seq_length()
            self.account.count_pass(found.started, time.perf_counter(), measures=self.engine.mode.measures)
            if self.account.pass_steps:
                count_reads(self.layers, self.account)

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Change all layers outside a pass: where it is stopped between two of them, no pass goes on."""
        self.settle()
        self.check_whole()
        self._broken, before = f"{what} was stopped half way", self.engine.list_tokens()
        try:
            yield
        except Exception:
            # Refused before any layer was changed, the cache is whole; else one may be cut in some of its parts only.
            if self.engine.list_tokens() == before:
                self._broken = find_fault(self.layers, self.engine)
            raise
        self._broken, self.marked = "", None

    def step_back(self, n_tokens: int) -> None:
        """Forget the newest tokens of every layer.

        Raises:
            CacheStateError: a layer cannot: what came before them is gone.
        """
        target, marked = self.get_seq_length() - n_tokens, self.marked
        with self._changing("stepping back"):
            broken = ""
            for i in range(len(self.layers) if n_tokens else 0):
                broken = self._crop_layer(i, n_tokens, target) or broken
        self._broken, self.marked = broken, marked
        self.account.session_tokens = min(self.account.session_tokens, target)
        self.check_whole()

    def _crop_layer(self, i: int, n_tokens: int, target: int) -> str:
        """Forget a layer's newest tokens, so that `target` are left; return why it cannot."""
        layers: list[Any] = self.layers
        if holds_states(layers[i]) and self.marked is not None and self.marked.tokens == target:
            put_back(layers[i], self.marked.states[i])
            return ""
        try:
            layers[i].crop(-n_tokens)
        except (FarKVError, ValueError, RuntimeError, AttributeError):
            return describe_stuck(layers, i)
        return ""

    def check_whole(self) -> None:
        """Raise CacheStateError where layers hold different tokens."""
        self._broken = self._broken or find_fault(self.layers, self.engine)
        if self._broken:
            raise CacheStateError(self._describe_broken())

    def _describe_broken(self) -> str:
        return f"this cache: expected all layers to hold the same tokens, but {self._broken}; start a new cache"

    def hand_over(self) -> None:
        """Let another thread go on with this cache: until then the thread that used it first has it."""
        self.settle()
        self.owner.hand_over()

    # --- what Hugging Face asks -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        self.owner.check()
        self._broken = "forgetting everything was stopped half way"
        super().reset()
        reset_unmanaged(self.layers)
        self.read_ids.clear()
        self.marked = None
        self._pass, self._broken = None, ""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the newest tokens, in the form of the transformers release in use."""
        with self._changing("cropping"):
            super().crop(*args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the beams."""
        with self._changing("reordering"):
            super().reorder_cache(beam_idx)
        self.read_ids.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        with self._changing("repeating sequences"):
            super().batch_repeat_interleave(repeats)
        self.read_ids.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        with self._changing("selecting sequences"):
            super().batch_select_indices(indices)
        self.read_ids.select(indices)
