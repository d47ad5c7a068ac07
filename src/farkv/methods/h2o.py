"""H2O: the records that all queries so far attended to most stay, and the newest ones, half each.

  every pass       note its queries
  long passes      add what they attended to, to every record's sum     (`math.accumulate`)
  end of prompt    add the rest, keep the greatest sums and the newest  (`math.keep`, `store.tiers`)
  every few steps  the same, so that decoding stays within the budget

A layer's records do not change between two evictions, so a step's weights may be added at the next one: K is then read
once for all of them, and tokens that are taken back before have added nothing. docs/papers/baselines.md has equation,
function and deviation.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Tensor
from farkv.config import H2O, XKV
from farkv.math.accumulate import add_weights
from farkv.math.importance import Form, Observed
from farkv.methods.capped import CappedKeeper
from farkv.methods.contract import Place, Query, Step
from farkv.methods.watch import Watcher
from farkv.methods.xkv import XKVRecipe
from farkv.store.records import Keep
from farkv.store.tiers import Tiers

# Queries whose weights may wait: as many tokens can be taken back as if they had never been.
LATEST = 32


class Asked(Watcher):
    """The queries of every layer whose weights are in no sum yet."""

    def watch(self, layer: int, query: Query, valid: Bool[Tensor, "B S"] | None) -> None:
        """Note a pass's queries, oldest first; padding is known from the records."""
        old = self.observed.get(layer)
        latest = query.q.detach()
        self.observed[layer] = Observed(latest if old is None else torch.cat([old.window, latest], 2), None, None)
        self.forms[layer] = Form(query.scaling, query.softcap)

    def count(self, layer: int) -> int:
        """Return how many queries wait."""
        old = self.observed.get(layer)
        return 0 if old is None else old.window.shape[2]

    def take(self, layer: int, leave: int) -> Tensor:
        """Return the oldest queries and forget them; the newest `leave` go on waiting."""
        window = self.observed[layer].window
        n = window.shape[2] - leave
        # A view would keep the whole pass's queries alive.
        self.observed[layer] = Observed(window[:, :, n:].clone(), None, None)
        return window[:, :, :n]


class HitterKeeper(CappedKeeper):
    """Keeps the greatest sums; a record's mark is its sum."""

    def __init__(self, asked: Asked, store: Tiers, share: float):
        super().__init__(asked, store, None, share)
        self.asked = asked

    def add(self, layer: int, visible: Bool[Tensor, "B h S"] | None, leave: int = 0) -> None:
        """Add the weights of waiting queries to the sums, but for the newest `leave`, which saw more records."""
        if self.asked.count(layer) <= leave:
            return
        n = self.store.length(layer) - leave
        keys = self.store.keys(layer, 0, n)
        sums = self.store.kept[layer].marks.view()[:, :, :n, 0]
        seen = None if visible is None else visible[..., :n].to(keys.device)
        add_weights(sums, self.asked.take(layer, leave).to(keys.device), keys, seen, self.asked.forms[layer])

    def allocate(self) -> None:
        """Give every layer the same."""
        self.allow_evenly()

    def mark(self, layer: int, visible: Bool[Tensor, "B h S"] | None, *, curve: bool = False) -> None:
        """Bring a layer's sums up to date."""
        self.add(layer, visible)

    def choose(self, layer: int, scores: Tensor, n_rows: int, visible: Bool[Tensor, "B h S"] | None, room: int) -> Keep:
        """Choose what stays; the newest keep their sums, too."""
        kept = super().choose(layer, scores, n_rows, visible, room)
        return kept._replace(marks=scores.gather(-1, kept.positions))


class H2ORecipe(XKVRecipe):
    """Keeps the same number of records in every layer, by all the attention that they got."""

    exact_marks = True

    def __init__(self, place: Place, config: H2O):
        super().__init__(place, XKV(fraction=config.fraction, rule="uniform", window=1, pool=1, sinks=0))
        assert self.watcher is not None
        self.watcher = Asked(self.watcher.config)
        self.keeper = self.hitters = HitterKeeper(self.watcher, self.store, config.recent)

    def observe(self, layer: int, step: Step) -> None:
        """Add the weights of a long pass, or of many steps, to the sums."""
        if self.hitters.asked.count(layer) > 2 * LATEST:
            self.hitters.add(layer, self.visible(layer, self.store.length(layer)), LATEST)
