"""One frozen config per method of our own and of the two papers'.

In: keyword arguments. Out: checked values. Knows no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from farkv.config.options import check_counts, check_fraction, check_name
from farkv.errors import ConfigError

Source = Literal["attn", "residual", "post_attn"]
SOURCES: tuple[Source, ...] = ("attn", "residual", "post_attn")


@dataclass(frozen=True, kw_only=True)
class Full:
    """Attend to every record: the reference. With a near limit each layer is copied near, in turn, at every step."""

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.fraction != 1.0:
            raise ConfigError(f"fraction: full attention reads all, expected 1.0, got {self.fraction!r}")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Attend to the first `sinks` and the most recent records (StreamingLLM's pattern, nothing evicted)."""

    fraction: float = 0.1
    sinks: int = 4

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Attend to random records per KV head and step, besides sinks and window: the floor of every plot."""

    fraction: float = 0.1
    sinks: int = 4
    window: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Attend to the records with the largest true attention weight: the ceiling; it reads every key."""

    fraction: float = 0.1
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)


@dataclass(frozen=True, kw_only=True)
class InfiniGen:
    """Attend to the records that a query estimated one layer ahead finds in a small index.

    Args:
        fraction: hard cap on the read fraction over all layers; 1.0 reads everything and equals the plain model.
            Left out, it is 0.1 (the paper's: 0.2) but never fewer than 64 records: a short text is read whole.
        paper: the published algorithm; it sets what follows where left at None.
        source: the hidden state the query is estimated from: `post_attn`, LN_i(h + attn_{i-1}), is ours;
            `residual`, LN_i(h_{i-1}); `attn`, layer i-1's attention input, is the paper's.
        columns: index columns R per KV head (ours: as many as fill 1/32 of the KV bytes; the paper's: 0.3 of
            the head dimension).
        index_bits: bits of an index entry, 4 or 8 (the paper's partial keys have the model's dtype).
        alpha: read only records within `alpha` logits of the best one (the paper's: 4).
        top_p: read only the records that hold this share of the estimated attention weight.
        sinks: first tokens that are always read (the paper's: 0).
        window: recent tokens that are always read; with sinks at most a quarter of the cap (the paper's: 0).
        top_up: share of the cap that is chosen late, by the layer's true query (the paper's: 0).
    """

    fraction: float | None = None
    paper: bool = False
    source: Source | None = None
    columns: int | None = None
    index_bits: int | None = None
    alpha: float | None = None
    top_p: float | None = None
    sinks: int | None = None
    window: int | None = None
    top_up: float | None = None
    # Records per KV head that are read however small the cap is; follows from `fraction`.
    least_records: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        defaults = _PAPER if self.paper else _OURS
        object.__setattr__(self, "least_records", LEAST_RECORDS if self.fraction is None else 1)
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_fraction(self.need_fraction)
        if self.source not in SOURCES:
            raise ConfigError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        check_counts(sinks=self.sinks or 0, window=self.window or 0)
        if self.columns is not None and self.columns < 1:
            raise ConfigError(f"columns: expected at least 1, got {self.columns!r}")
        if self.index_bits not in ((None,) if self.paper else (4, 8)):
            raise ConfigError(f"index_bits: expected 4 or 8, and none with paper=True; got {self.index_bits!r}")
        if self.alpha is not None and self.top_p is not None:
            raise ConfigError("alpha and top_p: give one of them, got both")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"alpha: expected a positive number of logits, got {self.alpha!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not 0 <= (self.top_up or 0) < 1:
            raise ConfigError(f"top_up: expected a share in [0, 1), got {self.top_up!r}")

    @property
    def need_fraction(self) -> float:
        """The cap, after defaults are filled in."""
        return 0.1 if self.fraction is None else self.fraction


LEAST_RECORDS = 64
_OURS = {"fraction": 0.1, "source": "post_attn", "sinks": 4, "window": 16, "top_up": 0.25, "index_bits": 4}
_PAPER = {"fraction": 0.2, "source": "attn", "sinks": 0, "window": 0, "top_up": 0.0, "alpha": 4.0}

# What a plan can drive: what a layer keeps after the prompt, holds near, and may fetch per step.
Lever = Literal["keep", "near", "fetch"]
LEVERS: tuple[Lever, ...] = ("keep", "near", "fetch")
Rule = Literal["xkv", "maxmin", "pyramid", "uniform"]
RULES: tuple[Rule, ...] = ("xkv", "maxmin", "pyramid", "uniform")
SCORERS = ("window", "expected", "value")
KEPT_FRACTION = 0.384  # XKV's published average: 61.6 % fewer KV bytes.


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
        levers: what a plan drives: `keep` (evict), `near` (hold near), `fetch` (cap per step). `near` and `fetch` need
            a plan and a selector beside this.
        rule: how layers share: `xkv` (greatest mean retention), `maxmin` (PrefixKV), `pyramid` (PyramidKV), `uniform`.
        scorer: how records are scored: `window` (the paper's), `expected`, `value`.
        window: recent tokens that are always kept, whose queries score the others (the paper's: 8).
        pool: width of the average over neighbouring tokens' scores (the paper's: 7).
        sinks: first tokens that are always kept.
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
    # Records per KV head and layer that are kept however small the budget is; follows from it.
    least_records: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        given = [n for n in ("fraction", "retention", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"XKV: expected one of fraction, retention and tokens, got {' and '.join(given)}")
        if self.fraction is not None:
            check_fraction(self.fraction)
        if self.retention is not None and not 0 < self.retention <= 1:
            raise ConfigError(f"retention: expected a number in (0, 1], got {self.retention!r}")
        object.__setattr__(self, "sinks", (0 if self.paper else 4) if self.sinks is None else self.sinks)
        object.__setattr__(self, "least_records", 1 if given else LEAST_RECORDS)
        object.__setattr__(self, "levers", tuple(self.levers))
        check_counts(tokens=self.tokens or 0, window=self.window, sinks=self.sinks or 0)
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ConfigError(f"window and pool: expected at least 1, pool odd; got {self.window} and {self.pool}")
        names = {"rule": (self.rule, RULES), "scorer": (self.scorer, SCORERS)}
        for option, (got, known) in [*names.items(), *(("levers", (lever, LEVERS)) for lever in self.levers)]:
            check_name(option, got, known)
        if not self.levers:
            raise ConfigError(f"levers: expected some of {', '.join(LEVERS)}, got none")

    @property
    def need_fraction(self) -> float:
        """The kept fraction, after the default is filled in."""
        return KEPT_FRACTION if self.fraction is None else self.fraction
