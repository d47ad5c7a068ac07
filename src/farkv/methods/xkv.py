"""XKV: every layer keeps its own share of a cache budget; the rest is evicted, and attention is dense over what stays.

The steps, in the paper's order (docs/papers/xkv.md has equation, function and deviation):
  every pass       observe: the last queries of every layer            (`math.importance`)
  end of prompt    score every record by them                          (`math.importance`)
                   allocate: how many each layer keeps                 (`math.allocate`, unless a plan says so)
                   evict: the best of every head stay                  (`engine.evict`)
  every few steps  the same, so that decoding stays within the budget  (not in the paper)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from farkv._axes import Bool, Float32, Tensor
from farkv.config import (
    LEVERS,
    RULES,
    Lever,
    Rule,
    check_counts,
    check_flag,
    check_fraction,
    check_name,
    check_window,
    show_value,
)
from farkv.errors import ConfigError
from farkv.math.importance import SCORERS, observe_queries, score_records
from farkv.math.step import Query
from farkv.methods.base import LEAST_RECORDS, Evictor, KeepRule, Records
from farkv.methods.last_queries import map_tensors

# XKV's published average: 61.6 % fewer KV bytes.
KEPT_FRACTION = 0.384


@dataclass(frozen=True, kw_only=True)
class XKV:
    """Give every layer its own share of a cache budget; what a layer has no room for is evicted after the prompt.

    Without a plan, the shares are found from each prompt: at most one of `fraction`, `retention` and `tokens` says how
    much is kept. With one (`attach(..., plan=...)`) they are the plan's.

    Args:
        fraction: hard cap on the kept (and so the read) fraction over all layers. Left out, and with no other budget,
            it is 0.384 but never fewer than 64 records: a short text is kept whole.
        retention: keep as little as holds this share of the observed attention mass, mean over layers.
        tokens: records per KV head, summed over layers, besides the window (the paper's `total_size`).
        levers: what a plan drives: `keep` (evict), `near` (pin near), `fetch` (cap per step). `near` and `fetch` need
            a plan and a selector beside this.
        rule: how layers share: `xkv` (greatest mean retention), `maxmin` (PrefixKV), `pyramid` (PyramidKV), `uniform`.
        scorer: how records are scored: `window` (the paper's), `expected`, `value`.
        window: recent tokens that are always kept, whose queries score the others (the paper's: 8).
        pool: width of the average over neighbouring tokens' scores (the paper's: 7).
        sinks: first tokens that are always kept; left out, 4 (the paper's: 0).
        paper: as published: no sinks, and decoding never evicts, so the cache grows by every generated token.
    """

    fraction: float | None = None
    retention: float | None = None
    tokens: int | None = None
    levers: tuple[Lever, ...] = ("keep",)
    rule: Rule = "xkv"
    scorer: Literal["window", "expected", "value"] = "window"
    window: int = 8
    pool: int = 7
    sinks: int | None = None
    paper: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("fraction", "retention", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"XKV: expected one of fraction, retention and tokens, got {' and '.join(given)}")
        if self.fraction is not None:
            check_fraction(self.fraction)
        if self.retention is not None:
            check_fraction(self.retention, "retention")
        for name, count in (("tokens", self.tokens), ("sinks", self.sinks)):
            if count is not None:
                check_counts(**{name: count})
        check_window(self.window, self.pool)
        check_flag(paper=self.paper)
        if not isinstance(self.levers, tuple):
            raise ConfigError(f"levers: expected a tuple of names, got {show_value(self.levers)}")
        names = {"rule": (self.rule, RULES), "scorer": (self.scorer, SCORERS)}
        for option, (got, known) in [*names.items(), *(("levers", (lever, LEVERS)) for lever in self.levers)]:
            check_name(option, got, known)
        if not self.levers:
            raise ConfigError(f"levers: expected some of {', '.join(LEVERS)}, got none")

    @property
    def has_budget(self) -> bool:
        """Say whether one was given."""
        return any(value is not None for value in (self.fraction, self.retention, self.tokens))

    @property
    def keep_rule(self) -> KeepRule:
        """How much is kept, after defaults are filled in."""
        return KeepRule(
            fraction=KEPT_FRACTION if self.fraction is None else self.fraction,
            tokens=self.tokens,
            retention=self.retention,
            share=self.rule,
            sinks=self.sinks if self.sinks is not None else (0 if self.paper else 4),
            window=self.window,
            least=1 if self.has_budget else LEAST_RECORDS,
            grows=self.paper,
        )


class QueryEvictor(Evictor):
    """Scores records by a layer's last queries.

    Args:
        config: with `scorer`, `window` and `pool`.
    """

    def observe(self, records: Records, query: Query) -> None:
        """Slide the layer's window of queries."""
        last, config = self.last[records.layer], self.config
        real = records.real_tokens(records.seen)
        valid = None if real is None else real.expand(query.q.shape[0], -1)
        observed = observe_queries(query.q, config.window, config.scorer, last.observed, valid=valid)
        last.note(observed, query.logits, records.seen)

    def score(
        self, layer: int, k: Tensor, v: Tensor, visible: Bool[Tensor, "B h S"] | None, n_recent: int | None = None
    ) -> Float32[Tensor, "B Hkv N"]:
        """Score records where they are, all but the window's."""
        last = self.last[layer]
        assert last.observed is not None
        # A deliberate copy where records are in host memory: a few queries go to them, not they near.
        observed = map_tensors(last.observed._replace(latest=None), lambda t: t.to(k.device))
        if n_recent is not None:
            observed = observed._replace(window=observed.window[:, :, -n_recent:])
        return score_records(self.config.scorer, observed, k, v, visible, last.logits, pool=self.config.pool)
