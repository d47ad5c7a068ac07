"""Which records a step reads: budgets, a method's scores, and which records are available at this step.

In: a query, estimated or true. Out: positions. The method scores; here the scores become a choice, by the plain
operations or, where they know the method's index, by the fast kernels (`engine.fast_choice`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.account import Account
from farkv.engine.bank import Bank
from farkv.engine.budget import Budget, Budgets
from farkv.engine.fast_choice import (
    Pages,
    Scored,
    choose_drawn,
    choose_early,
    choose_late,
    choose_paged,
    choose_varied,
)
from farkv.engine.fast_path import FastPath
from farkv.engine.records import LayerRecords
from farkv.math.sampling import make_seeds, sample_top
from farkv.math.select import (
    Choice,
    find_recent,
    forbid,
    force_sinks,
    limit_pages,
    select_above,
    select_rest,
    select_seen,
    select_top,
)
from farkv.math.step import Query
from farkv.methods.base import Selector
from farkv.store.placement import Placement


class Open(NamedTuple):
    """Of a layer's rows, which may be chosen, and which are read because they are recent; None and None: all may be."""

    valid: Bool[Tensor, "b h S"] | None
    recent: Bool[Tensor, "b h S"] | None


class Chooser:
    """A method's scores, made into choices."""

    def __init__(self, selector: Selector, budgets: Budgets, fast: FastPath, account: Account, bank: Bank):
        self.selector, self.budgets, self.fast, self.account, self.bank = selector, budgets, fast, account, bank
        self.reaches_all = budgets.store.placement is not Placement.DISK

    def choose(self, records: LayerRecords, query: Query, n_rows: int, budget: Budget) -> Choice:
        """Choose `budget.early` of `n_rows` rows, one that is not stored yet included, but for the newest.

        1. Bring the method's index up to date.  2. Score.  3. Sinks and each sequence's window first.  4. The best.
        """
        n_old = n_rows - budget.newest
        self.selector.prepare(records, n_old)
        self._count_scored(records, n_old)
        scored = self._find_fast(records.layer, query, n_rows, budget)
        # Guessed tokens take their turns layer by layer, so what one step saves would not be known to the next.
        varies = not records.mode.drafted and self.may_vary(records.layer, query, budget)
        if varies and budget.early < n_old:
            return self._vary(records, query, n_old, budget, scored)
        sampled = self._find_sampled(records.layer)
        if sampled is not None and budget.early < n_old:
            return self._draw(records, query, n_old, budget, scored, sampled)
        if scored is not None:
            pages = self._find_pages(records.layer)
            if pages is not None:
                return choose_paged(scored, budget.early, budget.sinks, pages, None)
            return choose_early(scored, budget)
        return self._select(records.layer, self._score(records, query, n_old, budget), budget)

    def _find_sampled(self, layer: int) -> Bool[Tensor, "b Hkv"] | None:
        """Say of which heads records are drawn; None: of none, or a disk's pages limit what can be had."""
        if self.budgets.share_of(layer) >= 1 or not self._reaches(layer):
            return None
        return self.selector.find_sampled(layer)

    def _draw(
        self, records: LayerRecords, query: Query, n_old: int, budget: Budget, scored: Scored | None, sampled: Tensor
    ) -> Choice:
        """Draw records by weight, of the heads that are sampled."""
        gone = records.evicted
        tokens = [n + gone for n in records.count_real(n_old + budget.newest)]
        seeds = make_seeds(records.layer, tokens, sampled)
        if scored is not None:
            return choose_drawn(scored, budget, seeds)
        visible = self._find_open(records, n_old, budget)
        scores = self._score(records, query, n_old, budget)
        real = records.visible(n_old) if visible.valid is None else visible.valid
        return sample_top(scores, budget.early, seeds, real, budget.own_early)

    def may_vary(self, layer: int, query: Query, budget: Budget) -> bool:
        """Say whether heads may read different numbers: the true query chooses, and counts are at hand."""
        if self.bank.burst <= 1 or budget.late or self.budgets.share_of(layer) >= 1 or self.selector.rule is not None:
            return False
        return query.q.device.type == "cpu"

    def _vary(self, records: LayerRecords, query: Query, n_old: int, budget: Budget, scored: Scored | None) -> Choice:
        """Choose by the bank's threshold, up to its caps, and let it note what was chosen."""
        early, recent = budget.list_own(records.shape.batch)
        own = torch.tensor(recent)
        counts, newest = [n - r for n, r in zip(early, recent, strict=True)], [budget.newest + r for r in recent]
        terms = self.bank.lend(records.layer, records.seen - 1, counts, newest)
        if scored is not None:
            varied = choose_varied(scored, budget, terms)
        else:
            scores = self._reach(records.layer, self._score(records, query, n_old, budget))
            caps, fewest = ((torch.tensor(part) + own).clamp_(max=n_old) for part in (terms.caps, terms.fewest))
            varied = select_above(scores, caps, fewest, torch.tensor(terms.least, dtype=torch.float32), own)
        self.bank.note(counts, varied.counts.float().mean(-1).tolist(), varied.floors.tolist(), newest)
        return varied.choice

    def _score(self, records: LayerRecords, query: Query, n_old: int, budget: Budget) -> Float32[Tensor, "B Hkv S"]:
        """Score what is open, sinks and recent records first."""
        visible = self._find_open(records, n_old, budget)
        return self._force(self.selector.score(records, query, n_old, visible.valid), visible, budget)

    def choose_rest(self, records: LayerRecords, query: Query, budget: Budget, taken: Choice) -> Choice | None:
        """Choose `budget.late` more by the true query: the best of what the estimated one left out."""
        if budget.late == 0:
            return None
        layer, n_old = records.layer, records.length - budget.newest
        self._count_scored(records, n_old)
        scored = self._find_fast(layer, query, records.length, budget)
        pages = self._find_pages(layer, is_late=True)
        if scored is not None:
            if pages is not None:
                return choose_paged(scored, budget.late, 0, pages, taken)
            return choose_late(scored, budget, taken)
        valid = self._find_open(records, n_old, budget).valid
        scores = self.selector.score_late(records, query, n_old, valid)
        if self._reaches(layer) and valid is None:
            return select_top(forbid(scores, taken), budget.late)
        reached = scores if pages is None else limit_pages(scores, *pages)
        return select_rest(reached, taken, budget.late, budget.own_late)

    # --- what is open -----------------------------------------------------------------------------------------

    def _find_fast(self, layer: int, query: Query, n_rows: int, budget: Budget) -> Scored | None:
        """Return what the fast kernels choose from; None where the plain operations must."""
        if self.selector.rule is not None:
            return None
        if not self._reaches(layer) and (budget.own is not None or query.q.device.type != "cpu"):
            # The pages of a padded batch are not one sequence's own; the kernels of a GPU do not know pages.
            return None
        view = self.fast.find_view(layer, query, self.selector)
        if view is None:
            return None
        starts = None
        if budget.own is not None:
            lengths = self.fast.padding.count(n_rows)
            assert lengths is not None
            starts = [n_rows - n for n in lengths.real]
        return Scored(self.fast.use(), view, query, n_rows - budget.newest, starts)

    def _find_open(self, records: LayerRecords, n_rows: int, budget: Budget) -> Open:
        valid = records.visible(n_rows)
        if valid is None or budget.own is None or budget.own.recent is None:
            return Open(valid, None)
        recent = find_recent(valid, budget.own.recent)
        return Open(valid & ~recent, recent)

    def _force(self, scores: Float32[Tensor, "B Hkv S"], visible: Open, budget: Budget) -> Tensor:
        """Put padding last, sinks and recent records first, in place."""
        if visible.valid is not None:
            scores = scores.masked_fill_(~visible.valid, float("-inf"))
        return force_sinks(scores, budget.own_sinks, visible.valid, visible.recent)

    def _select(self, layer: int, scores: Float32[Tensor, "B Hkv S"], budget: Budget) -> Choice:
        """Choose by the method's rule, or the best up to the cap, of what is in reach."""
        rule, cap = self.selector.rule, budget.early
        if rule is not None and cap > 0 and self.selector.cap.fraction < 1:
            return rule(self._reach(layer, scores), cap, budget.own_early)
        if self._reaches(layer) and not self.selector.hides:
            return select_top(scores, cap, budget.own_early)
        return select_seen(self._reach(layer, scores), cap, budget.own_early)

    # --- what can be had --------------------------------------------------------------------------------------

    def _reaches(self, layer: int) -> bool:
        """Return whether every record may be chosen: none needs a disk read that the cap must bound."""
        return self.reaches_all or not self.selector.limits_pages or self.budgets.share_of(layer) >= 1

    def _reach(self, layer: int, scores: Tensor) -> Tensor:
        """Keep records that are in memory, and those on the few pages this step may read from disk; mask the others."""
        pages = self._find_pages(layer)
        return scores if pages is None else limit_pages(scores, *pages)

    def _find_pages(self, layer: int, *, is_late: bool = False) -> Pages | None:
        """Return which pages are in memory and how many a step may read from disk; None where all are in reach."""
        if self._reaches(layer):
            return None
        resident, tokens = self.budgets.store.find_resident(layer)
        # Rounded up: as many records are in reach as the cap has. What is read late is waited for: rounded down.
        pages = max(1, math.ceil(self.budgets.share_of(layer) * resident.shape[-1] - 1e-9))
        late = int(self.selector.cap.top_up * pages)
        return Pages(resident, tokens, late if is_late else pages - late)

    def _count_scored(self, records: LayerRecords, n_rows: int) -> None:
        self.account.layer(records.layer).index_bytes += self.selector.count_scored_bytes(records, n_rows)
