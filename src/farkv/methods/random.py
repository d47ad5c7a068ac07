"""Random records: what a choice without knowledge is worth."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from farkv.config import Random
from farkv.math.select import Choice, force_sinks
from farkv.methods.contract import Budget, Place, Query
from farkv.methods.sparse import SparseRecipe


class RandomRecipe(SparseRecipe):
    """Reads sinks, the window and random records, drawn anew per layer, KV head and step."""

    def __init__(self, place: Place, config: Random):
        super().__init__(place, fraction=config.fraction, sinks=config.sinks, window=config.window)
        self.generator = torch.Generator(place.device).manual_seed(config.seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomRecipe:
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            setattr(other, name, value.clone_state() if name == "generator" else deepcopy(value, memo))
        return other

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """1. A random score for every real record.  2. Sinks before all."""
        n_old = self.store.length(layer) - budget.tail
        batch, heads = self.store.heads(layer)
        scores = torch.rand(batch, heads, n_old, generator=self.generator, device=query.q.device)
        valid, recent = self.find_open(layer, n_old, budget)
        if valid is not None:
            scores.masked_fill_(~valid, -torch.inf)
        return self.pick(layer, force_sinks(scores, budget.own_sinks, valid, recent), budget)
