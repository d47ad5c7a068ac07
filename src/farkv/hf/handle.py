"""An attached model: hooks in, a cache maker out, everything put back on exit.

In: a model, a method's config, byte limits. Out: a `Handle`. Model files stay untouched, and an ordinary cache
passed to an attached model behaves as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import count
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv.account import Account
from farkv.config import read_count
from farkv.engine.build import Roles, make_engine
from farkv.engine.least import Least, find_least
from farkv.engine.setup import Setting, Setup
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.architecture import read_architecture
from farkv.hf.arguments import count_new, find_cache, find_ids
from farkv.hf.cache import FarCache
from farkv.hf.exact_call import generate_far
from farkv.hf.generate import unwrap_generate, wrap_generate
from farkv.hf.hooks import check_pass, check_weights, find_unread, make_inject, note_positions
from farkv.hf.identity import ModelIdentity
from farkv.hf.indexed import IndexedLayer, make_narrow
from farkv.hf.latents import mark, note_latents, unmark
from farkv.hf.layer import FarLayer
from farkv.hf.look import Look
from farkv.hf.lookahead import Layers, Lookahead
from farkv.hf.place import find_base, switch_attention
from farkv.hf.prompt import CHUNK_TOKENS
from farkv.hf.receipt import make_receipt
from farkv.hf.shapes import measure_shapes
from farkv.hf.state import make_unmanaged_layer
from farkv.hf.unmanaged import count_unmanaged
from farkv.hf.verify import ATTACHED, Verifier
from farkv.methods.table import Method, find_layer_type
from farkv.receipt import Receipt
from farkv.store.records import SavedText
from farkv.store.sizes import LayerShape

log = logging.getLogger("farkv")
_numbers = count()


class Handle(AbstractContextManager["Handle"]):
    """An attached model. Leave the `with` block or call `detach()` to have the model as it was."""

    def __init__(self, model: PreTrainedModel, roles: Roles, setting: Setting, *, looks: bool, lends: bool):
        self.model, self.roles, self.setting = model, roles, setting
        self.number = next(_numbers)
        self._hooks: list[Any] = []
        # Whether a `generate` without a cache is lent one.
        self.lends = lends
        # The newest cache; where it was lent and is gone, what it had to tell.
        self._last: FarCache | None = None
        self._told: Receipt | None = None
        self._shape: tuple[LayerShape, torch.dtype] | None = None
        # Managed layers, as one token showed them.
        self.shapes: dict[int, LayerShape] = {}
        # Layers left to Hugging Face, as one token leaves them.
        self.unmanaged: dict[int, Any] = {}
        found = read_architecture(model, find_layer_type(roles.selects))
        self.decoder, self.blocks, self.attention = found.decoder, found.blocks, found.attention
        self.layer_types, self._unmanaged_arguments, self.managed = found.types, found.arguments, found.managed
        self.device = found.device
        self.setting = self.setting._replace(n_groups=found.n_groups, indexer=found.indexer)
        self.latents, self.setting = note_latents({i: self.attention[i] for i in self.managed}, self.setting)
        self.base = find_base(model)
        # A method that cannot work with this model says so now, not when the first cache is made.
        make_engine(roles, Setup(self.managed, self.device, Account(), self.setting))
        layers = Layers(self.blocks, self.attention, self.layer_types, self.managed)
        self._ahead = Lookahead(layers)
        look = Look(self) if looks else None
        try:
            self._attach()
            if look is not None:
                look.compare(self)
                self._last = None
        except BaseException:
            # Stopped half way: the model is as it was.
            self._detach()
            raise
        _handles[id(model)] = self

    @property
    def method(self) -> Method:
        """Return the config of what selects, or of what evicts where nothing does."""
        method = self.roles.selects or self.roles.evicts
        assert method is not None
        return method

    @property
    def unmanaged_kinds(self) -> set[str]:
        """Return the kinds of the layers that are left to Hugging Face."""
        return {kind for i, kind in enumerate(self.layer_types) if i not in self.managed}

    # --- attaching ------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        model = self.model
        switch_attention(model, self.base)
        base = self.base if self.base != "sdpa" or _compat.supports_sdpa(model, self.decoder) else "eager"
        for i, module in self.attention.items():
            mark(module, base, self.latents.get(i))
        hooks = self._hooks
        verifier = Verifier()
        for module in {model, self.decoder}:
            hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            # Called after an exception too: what a pass had stored is then taken back.
            hooks.append(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        # Order matters: the verifying dense pass is part of the pass, the comparison comes after it.
        hooks.append(model.register_forward_pre_hook(verifier.before, with_kwargs=True))
        hooks.append(model.register_forward_hook(verifier.after, with_kwargs=True))
        for i in self.managed:
            hooks.append(self.attention[i].register_forward_pre_hook(make_inject(i), with_kwargs=True))
        fraction = getattr(self.method, "fraction", None)
        for i in self.managed if self.setting.indexer is not None and fraction not in (None, 1) else ():
            indexer: Any = self.attention[i].indexer
            hooks.append(indexer.register_forward_hook(make_narrow(i), with_kwargs=True))
        wrap_generate(model, self._lend if self.lends and self.managed else None, self.identity)

    def detach(self) -> None:
        """Remove every hook and restore the model's attention. Caches made before can no longer be used."""
        if self._hooks:
            self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        unwrap_generate(self.model)
        _handles.pop(id(self.model), None)
        for module in self.attention.values():
            unmark(module)
        _compat.set_attention_name(self.model, self.base)
        if self.setting.limits.disk is not None:
            self.setting.limits.disk.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __enter__(self) -> Handle:
        return self

    # --- caches and receipts --------------------------------------------------------------------------------

    def new_cache(
        self, *, tokens: int = 0, batch: int = 1, verify: int = 0, chunk_tokens: int = CHUNK_TOKENS
    ) -> FarCache:
        """Make an empty cache for one context (or one batch of them).

        Args:
            tokens: the context's expected length, answer included; memory for it is taken at once, and a limit
                that cannot hold it is reported before the prompt is read.
            batch: sequences (times beams) that `tokens` is meant for.
            chunk_tokens: tokens of the prompt that will be read at once; only limits that hold less than a layer ask.
            verify: compare this many decode steps with full attention over the same records.

        Raises:
            CapacityError: a limit cannot hold `tokens`; nothing was read or allocated.
        """
        if not self._hooks:
            raise CacheStateError("new_cache: the model is detached; call farkv.attach again")
        tokens, verify = read_count("new_cache: tokens", tokens), read_count("new_cache: verify", verify)
        batch, chunk_tokens = read_count("new_cache: batch", batch, 1), read_count("chunk_tokens", chunk_tokens, 1)
        cache = self.make_cache(tokens, verify)
        if tokens and self.managed:
            shape, dtype = self.measure_shape()
            cache.engine.admit(shape._replace(batch=batch), dtype, tokens, chunk_tokens)
        return cache

    def make_cache(
        self, reserve: int, verify: int, saved: SavedText | None = None, quant: str | None = None
    ) -> FarCache:
        """Make a cache with room for `reserve` tokens, over a saved text or coded as it is; nothing is admitted yet."""
        account, limits = Account(), self.setting.limits._replace(reserve_tokens=reserve, saved=saved)
        if quant is not None:
            limits = limits._replace(quant=quant)
        setting = self.setting._replace(limits=limits)
        engine = make_engine(self.roles, Setup(self.managed, self.device, account, setting, verifies=verify > 0))
        if engine.selector.source is not None:
            # Where no cache's records travel, no pass pays for looking ahead.
            self._hooks += self._ahead.start(self.decoder, engine.selector.source)
        ours = FarLayer if setting.indexer is None else IndexedLayer
        layers = [
            ours(i, engine, self.latents.get(i)) if i in self.managed else make_unmanaged_layer(*own)
            for i, own in enumerate(zip(self.layer_types, self._unmanaged_arguments, strict=True))
        ]
        cache = FarCache(layers, engine, made_by=self.number, identity=self.identity.get(), verify_steps=verify)
        self._last = cache
        return cache

    @cached_property
    def identity(self) -> ModelIdentity:
        """Who the model is, whenever it is asked."""
        return ModelIdentity(self.model)

    def measure_shape(self) -> tuple[LayerShape, torch.dtype]:
        """Return the widest managed layer's shape, from one token through the model: exact for any architecture."""
        if self._shape is None:
            found = measure_shapes(self.decoder, self.model.config, self.managed, self.device, self.latents)
            self._shape, self.shapes, self.unmanaged = found.widest, found.managed, found.unmanaged
        return self._shape

    def find_least(self, tokens: int) -> Least:
        """Return the least fraction of the KV bytes that a step reads of `tokens`, and why the cap asks for less.

        Layers that are left to Hugging Face read all they hold, and methods read a least number of records; its `note`
        is empty where the cap is above both.
        """
        if not self.managed:
            return Least(1.0)
        self.measure_shape()
        engine = make_engine(self.roles, Setup(self.managed, self.device, Account(), self.setting))
        sizes = {i: shape.token_bytes * tokens for i, shape in self.shapes.items()}
        return find_least(engine, tokens, sizes, count_unmanaged(self.unmanaged, tokens))

    @contextmanager
    def _lend(self) -> Iterator[FarCache]:
        """Make a cache for one call, and keep of it no more than its receipt: its memory is the next one's."""
        cache = self.make_cache(0, 0)
        try:
            yield cache
        finally:
            self._told, self._last = self.receipt(cache), None

    def receipt(self, cache: FarCache | None = None) -> Receipt:
        """Return the account of `cache`, or of the last one made, by `new_cache` or for a `generate` without one.

        Raises:
            CacheStateError: no cache was made yet.
        """
        cache = cache or self._last
        if cache is None and self._told is not None:
            return self._told
        if cache is None:
            raise CacheStateError("receipt: no cache was made yet; generate, or call new_cache() and generate with it")
        # What read everything, the prompt at least, is the model's own attention.
        kernel = "+".join([*sorted(cache.account.kernels), f"torch-{self.base}"])
        return make_receipt(self.model, self.roles, self.setting, self.layer_types, kernel, cache)

    def generate(self, *args: Any, exact: bool = False, draft_tokens: int | None = None, **kwargs: Any) -> Any:
        """Call `model.generate` on a far cache: `past_key_values`, or a new one.

        Args:
            exact: give full attention's own answer: sparse steps only draft, and one pass that reads everything says
                what stands. The fraction is then a matter of speed alone.
            draft_tokens: how many tokens are drafted at a time; None: as they pay, 0 where they do not.

        Raises:
            ConfigError: drafts cannot give what is asked for (beams, attentions), or this method evicts.
        """
        return generate_far(self, args, kwargs, exact=exact, draft_tokens=draft_tokens)

    # --- hooks: each returns None unless the pass runs on one of our caches ---------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = find_cache(args, kwargs)
        if cache is not None:
            n_new, ids = count_new(args, kwargs), find_ids(args, kwargs)
            check_pass(self.model, cache, self.number, ids)
            check_weights(self.model, cache, n_new, kwargs)
            cache.begin(module, n_new, ids, reads=module is self.decoder)
            note_positions(cache, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        cache = find_cache(args, kwargs)
        self._ahead.land()
        if cache is None:
            return
        unread = "" if out is None else find_unread(cache.layers)
        cache.end(module, reads=module is self.decoder, failed=out is None or bool(unread))
        if unread:
            raise CacheStateError(unread)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise CacheStateError(ATTACHED)


# Attached models, by identity; this keeps no handle alive.
_handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()


def find_handle(model: nn.Module) -> Handle | None:
    """Return the handle of an attached model."""
    return _handles.get(id(model))
