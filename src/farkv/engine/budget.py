"""How many records a step may read of each layer, and how they are split; in a padded batch, each sequence's own.

In: the method's cap, a plan's shares, how long the context is. Out: budgets, whose parts sum to no more than the cap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.engine.padding import Padding
from farkv.methods.base import Cap
from farkv.store.sizes import count_cap, count_forced
from farkv.store.tiers import Store


class Own(NamedTuple):
    """What each sequence of a padded batch may read: as many records as it would alone.

    recent: of its window, the tokens before `newest`; they are chosen early, before all others. None: none have any.
    """

    sinks: Int[Tensor, "b 1 1"]
    early: Int[Tensor, "b 1 1"]
    late: Int[Tensor, "b 1 1"]
    recent: Int[Tensor, "b 1 1"] | None


class Budget(NamedTuple):
    """How the records of one layer and step are split; their sum is the cap.

    sinks: of the early ones, those that are forced.  early: chosen before, or by, the layer's query.  late: chosen by
    the true query after an estimated one.  newest: so many of the newest, always read.

    In a padded batch these are the largest of all sequences, but for `newest`, which is the smallest; `own` says what
    each may read.
    """

    sinks: int
    early: int
    late: int
    newest: int
    own: Own | None = None

    @property
    def total(self) -> int:
        """Return the cap."""
        return self.early + self.late + self.newest

    @property
    def own_sinks(self) -> int | Int[Tensor, "b 1 1"]:
        """Return the sinks of every sequence."""
        return self.sinks if self.own is None else self.own.sinks

    @property
    def own_early(self) -> Int[Tensor, "b 1 1"] | None:
        """Return how many each sequence may read early; None where all read the same."""
        return None if self.own is None else self.own.early

    @property
    def own_late(self) -> Int[Tensor, "b 1 1"] | None:
        """Return the same of those read late."""
        return None if self.own is None else self.own.late

    def list_own(self, batch: int) -> tuple[list[int], list[int]]:
        """Return how many each sequence may read early, and how many of these are of its window."""
        if self.own is None:
            return [self.early] * batch, [0] * batch
        recent = [0] * batch if self.own.recent is None else self.own.recent.flatten().tolist()
        return self.own.early.flatten().tolist(), recent

    def join_late(self) -> Budget:
        """Return the budget with all that may be chosen late chosen early."""
        own = self.own
        if own is not None:
            own = own._replace(early=own.early + own.late, late=torch.zeros_like(own.late))
        return self._replace(early=self.early + self.late, late=0, own=own)


class Budgets:
    """The budgets of one cache's layers.

    Args:
        shares: what a plan lets each layer read per step; None: the method's own fraction.
    """

    def __init__(self, cap: Cap, shares: dict[int, float] | None, store: Store, padding: Padding):
        self.cap, self.shares, self.store, self.padding = cap, shares, store, padding
        # Of a padded batch, until its mask changes.
        self._joined: dict[tuple[float, ...], Budget] = {}
        self._version = -1
        # Layers of one step mostly ask for the same.
        self._last: tuple[tuple[int, float], Budget] | None = None

    @property
    def burst(self) -> float:
        """Return how many times its share a layer may read in one step; a plan's shares hold at every step."""
        return self.cap.burst if self.shares is None else 1.0

    def share_of(self, layer: int) -> float:
        """Return the share of the context that a layer may read: the plan's, or the method's own."""
        return self.cap.fraction if self.shares is None else self.shares[layer]

    def count_floor(self, tokens: int) -> int:
        """Return how many records per KV head a layer may read of `tokens`, however small its share is."""
        if self.shares is not None:
            return 1
        return tokens if tokens <= self.cap.dense_tokens else self.cap.least

    def count(self, tokens: int, layer: int, pads: int = 0) -> int:
        """Return how many records per KV head a layer may read of `tokens` real tokens and `pads` of padding."""
        cap = count_cap(self.share_of(layer), tokens, self.count_floor(tokens))
        cap = cap if self.cap.most is None else min(cap, self.cap.most)
        evicted = self.store.evicted[layer]
        if evicted:
            # Of an evicted layer there are fewer rows than tokens; padding went first.
            rows = self.store.length(layer) + tokens + pads - self.store.seen(layer)
            cap = max(1, min(cap, rows - max(0, pads - evicted)))
        return cap

    def count_most(self, tokens: int, layer: int) -> int:
        """Return how many records per KV head a layer reads at most in one step."""
        fixed = self.split(tokens, layer)
        return min(tokens, fixed.newest + int(self.burst * (fixed.early + fixed.late)))

    def split(self, tokens: int, layer: int, pads: int = 0) -> Budget:
        """Split a layer's cap for `tokens` real tokens, the newest included, and `pads` of padding."""
        cap, share = self.count(tokens, layer, pads), self.share_of(layer)
        sinks, window = count_forced(cap, self.cap.sinks, self.cap.window, share, alone=self.cap.only_sinks)
        middle = cap - window - 1
        late = int(self.cap.top_up * (middle - sinks)) if share < 1 else 0
        return Budget(sinks, middle - late, late, window + 1)

    def get(self, tokens: int, layer: int) -> Budget:
        """Return a layer's budget; in a padded batch every sequence's is what it would be alone."""
        if self.padding.real is None:
            if self.store.evicted[layer]:
                return self.split(tokens, layer)
            key = tokens, self.share_of(layer)
            if self._last is None or self._last[0] != key:
                self._last = key, self.split(tokens, layer)
            return self._last[1]
        budget = self.split(tokens, layer)
        if budget.total >= tokens:
            # Where everything is read, the mask alone hides padding, as in the plain model.
            return budget
        if self._version != self.padding.version:
            self._joined, self._version = {}, self.padding.version
        evicted = self.store.evicted[layer]
        rows = self.store.length(layer) + tokens - self.store.seen(layer) if evicted else 0
        key = (tokens, self.share_of(layer), evicted, rows)
        if key not in self._joined:
            lengths = self.padding.count(tokens)
            assert lengths is not None
            budgets = [self.split(max(1, n), layer, tokens - max(1, n)) for n in lengths.real]
            self._joined[key] = join_budgets(budgets, lengths.run, self.padding.real.device)
        return self._joined[key]

    def count_own(self, layer: int, device: torch.device) -> Int[Tensor, "b 1 1"] | None:
        """Return each sequence's own cap for the context that is stored; None where nothing is padded."""
        seen = self.store.seen(layer)
        lengths = self.padding.count(seen)
        if lengths is None:
            return None
        caps = [self.count(max(1, n), layer, seen - max(1, n)) for n in lengths.real]
        return torch.tensor(caps, device=device)[:, None, None]


def join_budgets(budgets: list[Budget], runs: list[int], device: torch.device) -> Budget:
    """Return the sizes that hold every sequence's budget, and what of them is each one's own.

    As many of the newest are read from all sequences: the smallest number, which has no padding; what a sequence's
    window has beyond it is read early.

    Args:
        runs: of each sequence, the newest columns that are real without a gap.
    """
    newest = max(1, min(min(b.newest, run) for b, run in zip(budgets, runs, strict=True)))
    recent = [b.newest - newest for b in budgets]
    early = [b.early + n for b, n in zip(budgets, recent, strict=True)]
    late, sinks = [b.late for b in budgets], [b.sinks for b in budgets]
    own = torch.tensor([sinks, early, late, recent], device=device)[:, :, None, None]
    return Budget(
        max(sinks), max(early), max(late), newest, Own(own[0], own[1], own[2], own[3] if any(recent) else None)
    )
