"""Pages: per page of keys their bounds; at every step the pages that promise the largest logits are read (Quest).

The steps, in the paper's order (docs/papers/baselines.md has equation, function and deviation):
  as tokens come     bounds: per page and KV head the least and greatest key coordinates  (`math.bounds`)
  every layer, step  estimate: the largest logit that a page may hold, by the true query
                     select: the best pages, as many as the cap holds
                     attend

Bounds follow from the stored keys alone. Where they are lost (records were evicted, batches joined, a session loaded)
they are made anew from the store.
"""

from __future__ import annotations

import torch

from farkv._axes import Float, Int, Tensor
from farkv.config import Pages
from farkv.math.bounds import bound_pages, mark_pages, rank_tokens, score_bounds
from farkv.math.score import pool_group
from farkv.math.select import Choice, force_sinks
from farkv.methods.contract import Budget, Place, Query, Step
from farkv.methods.sparse import SparseRecipe
from farkv.store.near.bounds import PageBounds
from farkv.store.sizes import LayerShape
from farkv.store.tiers import BLOCK_TOKENS

# Capacities are multiples of so many tokens.
GROWTH_TOKENS = 64


class PagesRecipe(SparseRecipe):
    """Reads sinks, the window and the best pages by the true query."""

    def __init__(self, place: Place, config: Pages):
        super().__init__(place, fraction=config.fraction, sinks=config.sinks, window=config.window)
        self.config, self.page = config, config.page
        reserve = place.limits.reserve_tokens
        self.index = {i: PageBounds(self.store.index, place.device, reserve, config.page) for i in place.layers}

    # --- as tokens come -------------------------------------------------------------------------------------

    def observe(self, layer: int, step: Step) -> None:
        """Add new keys to the bounds. Coded ones wait until they are scored: their bounds are those of what is read."""
        n_old = self.store.length(layer) - step.k.shape[2]
        if self.index[layer].length == n_old and layer not in self.store.codecs:
            self.add_keys(layer, step.k)

    def catch_up(self, layer: int, n_tokens: int) -> None:
        """Bring a layer's bounds up to `n_tokens`, a block at a time: something was taken back, or is coded."""
        index = self.index[layer]
        while index.length < n_tokens:
            stop = min(index.length + BLOCK_TOKENS, n_tokens)
            # A deliberate copy where the pool is far: these keys were stored before.
            self.add_keys(layer, self.store.keys(layer, index.length, stop).to(self.store.device))

    def add_keys(self, layer: int, keys: Float[Tensor, "B Hkv T D"]) -> None:
        """Add keys of the tokens that follow to a layer's bounds."""
        index, n_new = self.index[layer], keys.shape[2]
        valid = self.visible(layer, index.length + n_new)
        valid = None if valid is None else valid[..., index.length :]
        index.append(bound_pages(keys.detach(), valid, self.page, index.unfinished), n_new)

    # --- every layer, every step ----------------------------------------------------------------------------

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """1. The largest logit of every page.  2. Join the query group.  3. The best pages, sinks before all."""
        n_old = self.store.length(layer) - budget.tail
        valid, recent = self.find_open(layer, n_old, budget)
        scores = rank_tokens(self.score(layer, query, n_old, valid), self.page, n_old)
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        return self.pick(layer, force_sinks(scores, budget.own_sinks, valid, recent), budget)

    def score(self, layer: int, query: Query, n_old: int, valid: Tensor | None) -> Tensor:
        """Return the worth of the pages of a layer's first `n_old` records, [B, Hkv, P]."""
        # The newest token's key is not here yet; it is read anyway.
        self.catch_up(layer, self.store.length(layer) - 1)
        bounds = self.index[layer].view(n_old)
        self.count_index(layer, bounds.numel() * bounds.element_size())
        best = score_bounds(query.q, bounds, query.scaling, query.softcap)
        return pool_group(best, None if valid is None else mark_pages(valid, self.page))

    # --- bytes ----------------------------------------------------------------------------------------------

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Bytes of one layer's bounds of a context of `tokens`: whole pages, and the steps in which they grow."""
        grows = self.store.limits.reserve_tokens < tokens
        n_pages = -(-(tokens + (GROWTH_TOKENS + 2 * self.page if grows else 0)) // self.page)
        return shape.batch * shape.kv_heads * n_pages * 2 * shape.k_dim * shape.itemsize

    # --- the batch ------------------------------------------------------------------------------------------

    def forget(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction: what is left stands on other pages."""
        self.index[layer].clear()

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest tokens, in the bounds too."""
        super().crop(n_tokens, layer)
        excess = self.index[layer].length - self.store.length(layer)
        if excess > 0:
            self.index[layer].crop(excess)

    def select(self, sequences: Int[Tensor, " N"], layer: int) -> None:
        """Keep these sequences, in the bounds too."""
        super().select(sequences, layer)
        self.index[layer].select(sequences)

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        super().clear(layer)
        self.index[layer].clear()
