"""The oracle: the records with the largest true attention weight. It reads every key, so it saves nothing.

Its `index_fraction` counts those keys; it is the upper bound of what choosing by weight can reach.
"""

from __future__ import annotations

import torch

from farkv.config import Oracle
from farkv.math.score import pool_group
from farkv.math.select import Choice, force_sinks
from farkv.methods.contract import Budget, Place, Query
from farkv.methods.mass import score_stored
from farkv.methods.sparse import SparseRecipe


class OracleRecipe(SparseRecipe):
    """Reads sinks, the window and the best records by the true query against the full keys."""

    def __init__(self, place: Place, config: Oracle):
        super().__init__(place, fraction=config.fraction, sinks=config.sinks, window=config.window)

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """1. True logits over all keys.  2. Join the query group.  3. The largest, sinks before all."""
        n_old = self.store.length(layer) - budget.tail
        batch, heads = self.store.heads(layer)
        if n_old == 0:
            scores = torch.empty(batch, heads, query.q.shape[1] // heads, 0, device=query.q.device)
        else:
            scores = score_stored(self.store, layer, query, n_old)
        self.count_index(layer, batch * heads * n_old * self.store.k_dims[layer] * query.q.element_size())
        valid, recent = self.find_open(layer, n_old, budget)
        pooled = pool_group(scores.to(query.q.device), valid)
        return self.pick(layer, force_sinks(pooled, budget.own_sinks, valid, recent), budget)
