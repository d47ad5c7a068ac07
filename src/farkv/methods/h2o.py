"""H2O: the records that all queries so far attended to most stay, and the newest ones, half each.

  every pass       note its queries
  long passes      add what they attended to, to every record's sum     (`math.accumulate`)
  end of prompt    add the rest, keep the greatest sums and the newest  (`math.keep`, `engine.evict`)
  every few steps  the same, so that decoding stays within the budget

A layer's records do not change between two evictions, so a step's weights may be added at the next one: K is then read
once for all of them, and tokens that are taken back before have added nothing. docs/papers/baselines.md has equation,
function and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farkv._axes import Float32, Tensor
from farkv.config import check_fraction, is_number, show_value
from farkv.errors import ConfigError
from farkv.math.accumulate import add_weights
from farkv.math.importance import Observed
from farkv.math.step import Query
from farkv.methods.base import Evictor, KeepRule, Records

# Queries whose weights may wait: as many tokens can be taken back as if they had never been.
LATEST = 32


@dataclass(frozen=True, kw_only=True)
class H2O:
    """Keep the records that all queries so far attended to most, and the recent ones, half each (heavy hitters).

    Args:
        fraction: hard cap on the kept (and so the read) fraction over all layers.
        recent: share of the kept records that are the newest ones (H2O's: one half).
    """

    fraction: float = 0.1
    recent: float = 0.5

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if not is_number(self.recent) or not 0 < self.recent < 1:
            raise ConfigError(f"recent: expected a share in (0, 1), got {show_value(self.recent)}")

    @property
    def keep_rule(self) -> KeepRule:
        """A hard cap, the same for every layer, of which the newest records take their share."""
        return KeepRule(self.fraction, window=0, most_recent=self.recent, by_prompt=False)


class HeavyHitters(Evictor):
    """Scores records by the sum of all weights that they got; the queries that are in no sum yet wait."""

    sums_scores = True

    def observe(self, records: Records, query: Query) -> None:
        """Note a pass's queries, oldest first; padding is known from the records."""
        last, latest = self.last[records.layer], query.q.detach()
        waiting = latest if last.observed is None else torch.cat([last.observed.window, latest], 2)
        last.note(Observed(waiting, None, None), query.logits, records.seen)

    def settle(self, records: Records, scores: Float32[Tensor, "B Hkv S"]) -> None:
        """Add the weights of a long pass, or of many steps, to the sums."""
        if self._count_waiting(records.layer) > 2 * LATEST:
            self._add(records, scores, LATEST)

    def rescore(self, records: Records, scores: Float32[Tensor, "B Hkv S"], n_recent: int) -> Tensor:
        """Bring a layer's sums up to date."""
        self._add(records, scores, 0)
        return scores

    def _count_waiting(self, layer: int) -> int:
        observed = self.last[layer].observed
        return 0 if observed is None else observed.window.shape[2]

    def _add(self, records: Records, scores: Tensor, leave: int) -> None:
        """Add the weights of waiting queries to the sums, but for the newest `leave`, which saw more records."""
        last, n_waiting = self.last[records.layer], self._count_waiting(records.layer)
        if last.observed is None or n_waiting <= leave:
            return
        n = n_waiting - leave
        queries, n_rows = last.observed.window[:, :, :n], records.length - leave
        keys, visible = records.keys(0, n_rows), records.known(n_rows)
        seen = None if visible is None else visible.to(keys.device)
        add_weights(scores[:, :, :n_rows], queries.to(keys.device), keys, seen, last.logits)
        # A view would keep the whole pass's queries alive.
        last.note(Observed(last.observed.window[:, :, n:].clone(), None, None), last.logits, last.seen)
