"""SnapKV: of every layer the records stay that the text's last queries attend to, equal shares per layer.

The steps are those of `methods.keep`, and docs/papers/baselines.md has equation, function and deviation.
"""

from __future__ import annotations

from farkv.config import XKV, SnapKV
from farkv.methods.capped import CappedKeeper
from farkv.methods.contract import Place
from farkv.methods.xkv import XKVRecipe


class SnapKVRecipe(XKVRecipe):
    """Keeps the same number of records in every layer, chosen by the text's last queries."""

    def __init__(self, place: Place, config: SnapKV):
        same = XKV(fraction=config.fraction, rule="uniform", window=config.window, pool=config.pool, sinks=0)
        super().__init__(place, same)
        assert self.watcher is not None
        self.keeper = CappedKeeper(self.watcher, self.store, config.window)
