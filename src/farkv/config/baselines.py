"""One frozen config per rival method, so that a comparison runs on the same store, counted the same way.

In: keyword arguments. Out: checked values. Knows no tensors. docs/papers/baselines.md says what each leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from farkv.config.options import check_counts, check_fraction
from farkv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Attend to the pages whose key bounds promise the largest logit (Quest): chosen anew at every step.

    Args:
        fraction: hard cap on the KV bytes read per step.
        page: tokens of a page (Quest's: 16).
        sinks, window: first and recent tokens that are always read.
    """

    fraction: float = 0.1
    page: int = 16
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)
        if not isinstance(self.page, int) or self.page < 1:
            raise ConfigError(f"page: expected at least 1 token, got {self.page!r}")


@dataclass(frozen=True, kw_only=True)
class LowBit:
    """Attend to the records that the true query finds in a copy of all key columns at few bits (YAKV's kind).

    Args:
        fraction: hard cap on the KV bytes read per step.
        bits: of one column of one key, 2 or 4.
        sinks, window: first and recent tokens that are always read.
    """

    fraction: float = 0.1
    bits: int = 2
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)
        if self.bits not in (2, 4):
            raise ConfigError(f"bits: expected 2 or 4, got {self.bits!r}")


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Keep of every layer the records that the text's last queries attend to; the rest is evicted after the text.

    Args:
        fraction: hard cap on the kept (and so the read) fraction over all layers.
        window: recent tokens that are always kept, whose queries score the others (SnapKV's: 32).
        pool: width of the average over neighbouring tokens' scores (odd).
    """

    fraction: float = 0.1
    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        check_kept(self.fraction, self.window, self.pool)


@dataclass(frozen=True, kw_only=True)
class PyramidKV:
    """SnapKV with more room in the lower layers, falling linearly (PyramidKV); the same sum over all layers."""

    fraction: float = 0.1
    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        check_kept(self.fraction, self.window, self.pool)


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
        if not 0 < self.recent < 1:
            raise ConfigError(f"recent: expected a share in (0, 1), got {self.recent!r}")


def check_kept(fraction: float, window: int, pool: int) -> None:
    """Raise ConfigError unless these say how records are scored and kept."""
    check_fraction(fraction)
    check_counts(window=window, pool=pool)
    if window < 1 or pool % 2 == 0:
        raise ConfigError(f"window and pool: expected at least 1, pool odd; got {window} and {pool}")
