"""What is evicted and when: at the end of a prompt, when a layer exceeds its share, when the pool is full.

In: the passes. Out: fewer records, in the store and in everything that follows it. What a pass makes due waits until it
is committed, so that one that fails or is stopped has evicted nothing; only a full pool makes room before. An evictor
scores (`methods.base`), shares say how many stay (`engine.shares`), a pool's policy says what was not read of late
(`engine.pool_policy`).
docs/papers/xkv.md has equation, function and deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Tensor
from farkv.engine.budget import Budgets
from farkv.engine.pool_policy import VOTERS, PoolPolicy
from farkv.engine.records import LayerRecords
from farkv.engine.shares import Shares
from farkv.math.importance import PADDING, sort_gains
from farkv.math.keep import choose_kept
from farkv.math.select import force_sinks
from farkv.math.step import AttentionFunction, Query, Step
from farkv.methods.base import Evictor, Selector
from farkv.store.records import Keep
from farkv.store.tiers import Store


class Due(NamedTuple):
    """A layer's part of a pass that is not committed yet: its new tokens, and the queries that vote in a full pool."""

    n_new: int
    voters: Query | None
    device: torch.device


class Eviction:
    """The eviction of one cache.

    Args:
        evictor, shares: None and None where layers keep all.
        pins: the share of the context that each layer pins near, by the evictor's scores; None: nothing is pinned.
        policy: of a pool that evicts when it is full; None where it refuses.
    """

    def __init__(
        self,
        records: dict[int, LayerRecords],
        selector: Selector,
        budgets: Budgets,
        *,
        evictor: Evictor | None,
        shares: Shares | None,
        pins: dict[int, float] | None,
        policy: PoolPolicy | None,
    ):
        self.records, self.selector, self.budgets = records, selector, budgets
        self.evictor, self.shares, self.pins, self.policy = evictor, shares, pins, policy
        self.store: Store = budgets.store
        # Nothing is to be done where layers keep all, nothing is pinned and the pool refuses.
        self.is_active = any(part is not None for part in (shares, pins, policy))
        # True while a prompt is attended to before the records that stay are stored.
        self.passing = False
        # The first pass of all: undone, there is nothing that it could have evicted, so nothing waits.
        self.is_first = True
        # True while layers are evicted one after the other.
        self.is_committing = False
        self._due: dict[int, Due] = {}

    # --- before attention -----------------------------------------------------------------------------------

    def begin(self, n_new: int, prompt_tokens: int) -> None:
        """Begin a pass; a whole prompt with planned shares is attended to before the records that stay are stored."""
        shares, self.is_first = self.shares, self.store.seen(next(iter(self.records))) == 0
        self.passing = shares is not None and shares.passes_by and shares.keeps_at_once(n_new, prompt_tokens)

    def make_room(self, layer: int, n_new: int) -> None:
        """Make room in a full pool for a pass of several tokens; the same pass never asks for more."""
        if self.policy is not None and n_new > 1 and self.policy.may_fit(layer, n_new):
            self._evict_unread(layer, self.policy.count_excess(layer, n_new))

    def observe(self, layer: int, step: Step) -> None:
        """Show a pass's queries to the evictor."""
        if self.evictor is not None:
            self.evictor.observe(self.records[layer], step.query)

    # --- after attention ------------------------------------------------------------------------------------

    def settle(self, layer: int, step: Step) -> None:
        """Note what is due for a layer: it is done when the pass is committed, after the first pass at once."""
        if not self.is_active:
            return
        if self.evictor is not None and self.shares is not None and self.evictor.sums_scores:
            self.evictor.settle(self.records[layer], self._scores(layer))
        voters = None if self.policy is None else step.query
        if voters is not None and step.n_new > VOTERS:
            # A copy: a view would keep the whole pass's queries of every layer.
            voters = voters._replace(q=voters.q[:, :, -VOTERS:].clone())
        self._due[layer] = Due(step.n_new, voters, step.k.device)
        if self.is_first:
            self.commit()

    def commit(self) -> None:
        """Do what is due in every layer: nothing of this pass will be taken back."""
        self.is_committing = bool(self._due)
        for layer, due in self._due.items():
            self._settle(layer, due)
        self.forget_due()
        self.is_committing = False

    def forget_due(self) -> None:
        """Do nothing of what is due: the pass is taken back."""
        self._due = {}
        if self.policy is not None:
            self.policy.forget_noted()

    def _settle(self, layer: int, due: Due) -> None:
        """1. At the end of the prompt evict and pin.  2. Evict where a layer is over its share, or the pool is full."""
        records, shares = self.records[layer], self.shares
        if self.policy is not None:
            self.policy.count_noted(layer)
        if due.n_new > 1 or records.seen <= records.prompt_tokens:
            if records.seen >= records.prompt_tokens:
                self._end_prompt(layer)
        elif shares is not None and shares.is_over(layer):
            self._rescore(layer)
            self._evict_least(layer, shares.count_slack(layer))
        if self.policy is not None:
            self._spare(layer, due)

    def _end_prompt(self, layer: int) -> None:
        """Evict what exceeds a layer's share, and pin; where shares depend on all layers, wait for the last."""
        ready, shares = [layer], self.shares
        if shares is not None:
            ready = self._score_prompt(layer, shares)
        for i in ready:
            if shares is not None:
                self._evict_least(i, shares.count_room(i))
            if self.pins is not None:
                self._pin(i, self.pins[i])

    def _score_prompt(self, layer: int, shares: Shares) -> list[int]:
        """Score a layer when the prompt has gone through it; return the layers that can be evicted now."""
        scores = self._rescore(layer)
        if shares.allowed is not None:
            return [layer]
        if shares.rule.by_prompt:
            n_old = max(0, self.records[layer].length - shares.recent)
            # A deliberate copy to the host: one curve per layer and prompt.
            shares.gains[layer] = sort_gains(scores[..., :n_old]).mean(0).cpu().numpy()
        if layer != shares.layers[-1]:
            return []
        shares.allocate()
        return shares.layers

    def _pin(self, layer: int, share: float) -> None:
        """Hold the best records of every head near."""
        assert self.evictor is not None
        records = self.records[layer]
        visible, keys = records.known(records.length), records.keys(0, records.length)
        seen = None if visible is None else visible.to(keys.device)
        scores = self.evictor.score(layer, keys, records.values(), seen)
        n = min(int(share * records.seen), scores.shape[-1])
        if n > 0:
            self.store.pin(layer, choose_kept(scores, scores.shape[-1], n, 0)[0])

    # --- by scores ------------------------------------------------------------------------------------------

    def _scores(self, layer: int) -> Tensor:
        return self.store.kept[layer].scores.view()[..., 0]

    def _rescore(self, layer: int) -> Tensor:
        assert self.evictor is not None
        assert self.shares is not None
        return self.evictor.rescore(self.records[layer], self._scores(layer), self.shares.recent)

    def _evict_least(self, layer: int, room: int) -> None:
        """Keep the best by score: `room` fewer than the layer may."""
        records, shares = self.records[layer], self.shares
        assert shares is not None
        # Free only memory that no later step will need.
        final = max(records.seen, self.store.limits.reserve_tokens)
        self.store.reserve({layer: shares.count(layer, final)})
        n_rows = records.length
        if n_rows <= max(shares.count(layer, records.seen) - room, shares.least):
            return
        scores = self._scores(layer).float().to(self.store.device)
        self._evict(layer, self._choose(layer, scores, n_rows, records.known(n_rows), room))

    def _choose(
        self, layer: int, scores: Tensor, n_rows: int, visible: Bool[Tensor, "B h S"] | None, room: int
    ) -> Keep:
        """Choose which of `n_rows` records stay: sinks, the newest, the best by score; `room` fewer than allowed."""
        shares = self.shares
        assert shares is not None
        n_keep = max(shares.count(layer, self.records[layer].seen) - room, min(n_rows, shares.least))
        n_recent = min(shares.recent, n_rows)
        n_old = n_rows - n_recent
        seen = None if visible is None else visible[..., :n_old]
        old = force_sinks(scores[..., :n_old].clone(), min(shares.rule.sinks, n_old), seen)
        if seen is not None:
            # A score is never below 0: without this, padding would tie with real records of no weight.
            old.masked_fill_(~seen, PADDING)
        positions, kept = choose_kept(old, n_rows, n_keep, n_recent)
        if self.evictor is not None and self.evictor.sums_scores:
            kept = scores.gather(-1, positions)
        return Keep(positions, kept, n_recent)

    # --- a full pool ----------------------------------------------------------------------------------------

    def _spare(self, layer: int, due: Due) -> None:
        """Count what the pass's last queries would read; evict if the next token has no room."""
        assert self.policy is not None
        assert due.voters is not None
        decodes = due.n_new == 1
        if not decodes or self.selector.reads_all(layer):
            cap = self.budgets.count(self.records[layer].seen, layer)
            own = self.budgets.count_own(layer, due.device)
            self.policy.vote(self.records[layer], due.voters, cap, own)
        # Never this pass's own tokens: where it was the first, all of them can still be taken back.
        self._evict_unread(layer, self.policy.count_excess(layer, 1, spare=decodes), newest=due.n_new)

    def _evict_unread(self, layer: int, n: int, newest: int = 0) -> None:
        """Evict `n` records of every KV head by the pool's policy.

        Args:
            newest: records that stay besides those that always do, where others are enough.
        """
        if n > 0:
            assert self.policy is not None
            records = self.records[layer]
            self._evict(layer, self.policy.choose_kept(layer, n, records.known(records.length), newest))

    def _evict(self, layer: int, kept: Keep) -> None:
        """Evict all but the kept records; the method may prepare first."""
        self.selector.prepare_eviction(self.records[layer])
        self.store.evict(layer, kept)

    # --- a prompt that is never stored whole ------------------------------------------------------------------

    def store_passing(self, layer: int, step: Step, attention: AttentionFunction) -> object:
        """Attend to a prompt, then store only the records that stay."""
        assert self.evictor is not None
        assert self.shares is not None
        out = attention(step.query.q, step.k, step.v, step.mask)
        real = self.records[layer].real_tokens(step.n_new)
        visible = None if real is None else real[:, None]
        scores = self.evictor.score(layer, step.k, step.v, visible)
        kept = self._choose(layer, scores, step.n_new, visible, self.shares.count_room(layer))
        self.store.put(layer, step.k, step.stored_v, kept)
        return out

    def clear(self) -> None:
        """Forget what was counted of the context."""
        self.passing = self.is_committing = False
        self.forget_due()
        if self.shares is not None:
            self.shares.clear()
