"""Hooks that look one layer ahead: while layer i-1 runs, layer i's query is estimated, so that its records can travel.

In: a model's blocks and attention modules, and where queries are estimated from. Out: calls of `engine.speculate` at
decode steps. A pass that is not on one of our caches, or whose engine wants no estimate, costs the call of a hook.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import nn

from farkv._axes import Tensor
from farkv.config import Source
from farkv.hf import _compat
from farkv.hf.arguments import find_cache
from farkv.hf.attention import is_probing
from farkv.hf.cache import FarCache
from farkv.hf.query import Queries, Rope, add_attention, hidden_of, with_hidden


class Layers(NamedTuple):
    """What of a model is looked at: its blocks, attention modules and layer types, and the layers of ours."""

    blocks: nn.ModuleList
    attention: dict[int, nn.Module]
    types: list[str]
    managed: list[int]


class Lookahead:
    """Estimates for the layers of one attached model, any number of threads and caches."""

    def __init__(self, layers: Layers):
        self.layers = layers
        # The hidden state that queries are estimated from; None until a cache needs estimates.
        self.source: Source | None = None
        self.rope = Rope()
        self.queries = Queries(layers.attention)
        self._block_of: dict[int, nn.Module] = dict(enumerate(layers.blocks))
        # The block that runs in this thread, if the next layer wants an estimate of what comes out of its attention.
        self._flight = threading.local()

    def start(self, decoder: nn.Module, source: Source) -> list[Any]:
        """Set the hooks, on modules that come before a managed layer; none where they are set."""
        layers = self.layers
        if self.source is not None:
            return []
        self.source = source
        hooks: list[Any] = [
            module.register_forward_hook(self.rope.note, with_kwargs=True)
            for module in decoder.modules()
            if type(module).__name__.endswith("RotaryEmbedding")
        ]
        for i, block in enumerate(layers.blocks):
            attention = layers.attention.get(i)
            if i + 1 not in layers.managed:
                continue
            if attention is None or source == "residual":
                # A linear-attention block has no attention output to add: its input is what there is.
                hooks.append(
                    block.register_forward_pre_hook(self._make_at_once(i + 1, self._block_of), with_kwargs=True)
                )
            elif source == "attn":
                at_once = self._make_at_once(i + 1, layers.attention)
                hooks.append(attention.register_forward_pre_hook(at_once, with_kwargs=True))
            else:
                hooks.append(block.register_forward_pre_hook(self._make_before_block(i + 1), with_kwargs=True))
                hooks.append(attention.register_forward_hook(self._make_after_attention(i + 1)))
        return hooks

    def land(self) -> None:
        """Forget the block that runs: its pass is over."""
        self._flight.block = None

    def _make_at_once(self, i: int, modules: dict[int, nn.Module]) -> Any:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = self._find_asker(i, args, kwargs)
            if cache is not None:
                self._speculate(cache, i, modules[i], args, kwargs)

        return before

    def _make_before_block(self, i: int) -> Any:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = self._find_asker(i, args, kwargs)
            self._flight.block = None if cache is None else (cache, args, kwargs)

        return before

    def _make_after_attention(self, i: int) -> Any:
        def after(module: nn.Module, args: Any, out: Any) -> None:
            flight = getattr(self._flight, "block", None)
            if flight is None or is_probing():
                return
            cache, block_args, block_kwargs = flight
            self._flight.block = None
            attention: Tensor = out[0] if isinstance(out, tuple) else out
            hidden = add_attention(self._block_of[i - 1], hidden_of(block_args, block_kwargs), attention)
            args, kwargs = with_hidden(block_args, block_kwargs, hidden)
            self._speculate(cache, i, self._block_of[i], args, kwargs)

        return after

    def _find_asker(self, i: int, args: Any, kwargs: dict[str, Any]) -> FarCache | None:
        """Return our cache if its engine wants an estimate for layer i now; decode steps only."""
        cache = find_cache(args, kwargs)
        if cache is None or is_probing() or hidden_of(args, kwargs).shape[-2] != 1:
            return None
        return cache if cache.engine.wants_estimate(i) else None

    def _speculate(self, cache: FarCache, i: int, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Entering a compiler-disabled function costs as much as all that a hook does otherwise.
        speculate = speculate_uncompiled if _compat.is_compiling() else speculate_now
        speculate(self, cache, i, part, (args, kwargs))


def speculate_now(ahead: Lookahead, cache: FarCache, i: int, part: nn.Module, call: tuple[Any, Any]) -> None:
    """Estimate layer i's query and let the engine choose."""
    args, kwargs = call
    query = ahead.queries.estimate(i, part, args, kwargs, ahead.rope.get(ahead.layers.types[i]))
    if query is None:
        cache.account.add_fallback("own_query")
        return
    if ahead.queries.n_generic:
        # The layers that have no adapter, not the estimates.
        cache.account.fallbacks["generic_query"] = ahead.queries.n_generic
    cache.engine.speculate(i, query)


speculate_uncompiled: Any = torch.compiler.disable(speculate_now, recursive=True)
