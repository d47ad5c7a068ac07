"""Sinks and the recent window: what the cheapest sparse attention reads (StreamingLLM's pattern).

Deviation: nothing is evicted and positions are the true ones, so only the choice differs from the other methods.
"""

from __future__ import annotations

import torch

from farkv.config import Window
from farkv.math.select import Choice, force_sinks, select_top
from farkv.methods.contract import Budget, Place, Query
from farkv.methods.sparse import SparseRecipe


class WindowRecipe(SparseRecipe):
    """Reads the first `sinks` tokens, the rest of the cap from the end."""

    def __init__(self, place: Place, config: Window):
        super().__init__(place, fraction=config.fraction, sinks=config.sinks, window=0)

    def split(self, tokens: int, layer: int, pads: int = 0) -> Budget:
        """All but the sinks is window."""
        cap = self.count_cap(tokens, layer, pads)
        sinks = min(self.sinks, cap // 4)
        return Budget(sinks, cap - 1, 0, 1)

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """1. The youngest score highest.  2. Sinks before all."""
        n_old = self.store.length(layer) - budget.tail
        batch, heads = self.store.heads(layer)
        age = torch.arange(n_old, device=query.q.device, dtype=torch.float32)
        scores = age.repeat(batch, heads, 1)
        valid, recent = self.find_open(layer, n_old, budget)
        if valid is not None:
            scores.masked_fill_(~valid, -torch.inf)
        scores = force_sinks(scores, budget.own_sinks, valid, recent)
        return select_top(scores, budget.early, budget.own_early)
