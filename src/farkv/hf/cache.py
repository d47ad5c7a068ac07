"""The cache that a user passes as `past_key_values`: Hugging Face's face of a recipe.

In: new K and V per layer. Out: those same K and V; what attention reads besides them is the recipe's business.
Lengths are logical (tokens seen). The cache holds no model, hook or stream, so it can be deep-copied.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from farkv._axes import Int, Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.methods.contract import Kernel, Recipe, Step
from farkv.receipt import Account


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


class FarCache(_compat.Cache):
    """All layers of one context; pass it as `past_key_values`. Made by `new_cache()` of an attached model."""

    def __init__(self, layers: list[Any], recipe: Recipe, account: Account):
        super().__init__(layers=layers)
        self.recipe, self.account = recipe, account
        self.verify_steps = 0
        # What was read, token by token, where ids are known.
        self._ids: list[Tensor] = []
        self.identity: dict[str, str] = {}
        self._started = 0.0
        # The identity of a module, not the module: an exception must not leave a model inside a cache.
        self._outermost: int | None = None
        self._before = 0
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
        # Sessions join the cache and the file; a cache knows no files.
        from farkv.hf.session import save_cache

        save_cache(self, path, tokenizer=tokenizer, text=text)

    def take_text(self, ids: Int[Tensor, " N"], dtype: torch.dtype, device: torch.device) -> None:
        """Note the tokens of a text that was read before; the recipe holds its records."""
        self._ids = [ids]
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
        # As for sessions: joining knows caches, not the other way round.
        from farkv.hf.join import join_caches

        join_caches(self, other)
        # Of several texts none is the cache's own.
        self._ids = []

    def note_tokens(self, ids: Tensor | None) -> None:
        """Note the ids of the pass that begins; without them what is cached is no text that can be saved."""
        n = self.get_seq_length()
        known = sum(len(part) for part in self._ids)
        if known > n:
            self._ids = [torch.cat(self._ids)[:n]]
        if ids is not None:
            self._ids.append(ids[0].detach())

    def begin(self, module: object, n_new: int, ids: Tensor | None) -> None:
        """Note that a forward pass over `n_new` tokens starts; of nested modules the outermost counts.

        Raises:
            CacheStateError: a pass failed half way before, and what it had stored cannot be taken back.
        """
        if self._outermost not in (None, id(module)):
            return
        if self._outermost is not None:
            # It ended with neither output nor exception: it was killed from outside.
            self.take_back()
        self.check_whole()
        self._outermost, self._before = id(module), self.get_seq_length()
        self.note_tokens(ids)
        self.account.decoding = n_new == 1 and self._before > 0
        self._started = time.perf_counter()

    def take_back(self) -> None:
        """Forget the tokens of a pass that failed: what was there before it is there after it."""
        self._outermost = None
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            try:
                n_new = layer.get_seq_length() - self._before
                if n_new > 0:
                    layer.crop(-n_new)
            except (CacheStateError, ValueError, NotImplementedError, AttributeError):
                self._broken = f"layer {i} ({type(layer).__name__})"

    def step_back(self, n_tokens: int) -> None:
        """Forget the newest tokens of every layer.

        Raises:
            CacheStateError: a layer cannot: what came before them is gone.
        """
        self._before = self.get_seq_length() - n_tokens
        self.take_back()
        self.check_whole()

    def check_whole(self) -> None:
        """Raise CacheStateError where layers hold different tokens."""
        if self._broken:
            raise CacheStateError(
                "this cache: expected all layers to hold the same tokens, but some were to be forgotten and "
                f"{self._broken} cannot step back; start a new cache"
            )

    def end(self, module: object, *, failed: bool) -> None:
        """Count the forward pass that ends; verified steps are not timed. What a failed one stored is taken back."""
        if self._outermost != id(module):
            return
        if failed:
            self.take_back()
            return
        self._outermost = None
        account, seconds = self.account, time.perf_counter() - self._started
        account.context_tokens = self.get_seq_length()
        if not account.decoding:
            account.prefill_s += seconds
            return
        account.decode_steps += 1
        self._count_stock_layers()
        if not self.recipe.measuring:
            account.decode_s += seconds
            account.timed_steps += 1

    def _count_stock_layers(self) -> None:
        """Layers left to Hugging Face read all they hold."""
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            keys = getattr(layer, "keys", None)
            if isinstance(layer, FarLayer) or keys is None or keys.dim() != 4:
                continue
            self.account.record_bytes[i] = (keys.shape[-1] + layer.values.shape[-1]) * keys.element_size()
            held = keys.shape[0] * keys.shape[1] * keys.shape[2]
            self.account.layer(i).add_read(held, held)
