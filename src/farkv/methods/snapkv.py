"""SnapKV and PyramidKV: of every layer the records stay that the text's last queries attend to.

SnapKV gives every layer the same share; PyramidKV's fall linearly with depth, with the same sum. The steps are those of
`methods.xkv`; docs/papers/baselines.md has equation, function and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from farkv.config import Rule, check_fraction, check_window
from farkv.methods.base import KeepRule


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
    scorer: ClassVar = "window"
    share: ClassVar[Rule] = "uniform"

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_window(self.window, self.pool)

    @property
    def keep_rule(self) -> KeepRule:
        """A hard cap, of which the window takes no more than half."""
        return KeepRule(self.fraction, share=self.share, window=self.window, most_recent=0.5)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with more room in the lower layers, falling linearly (PyramidKV); the same sum over all layers."""

    share: ClassVar[Rule] = "pyramid"
