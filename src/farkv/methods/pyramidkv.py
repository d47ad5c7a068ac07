"""PyramidKV: SnapKV with shares that fall linearly with depth, and the same sum over all layers.

The steps are those of `methods.keep`, and docs/papers/baselines.md has equation, function and deviation.
"""

from __future__ import annotations

from farkv.config import XKV, PyramidKV
from farkv.methods.capped import CappedKeeper
from farkv.methods.contract import Place
from farkv.methods.xkv import XKVRecipe


class PyramidKVRecipe(XKVRecipe):
    """Keeps more records in lower layers, chosen by the text's last queries."""

    def __init__(self, place: Place, config: PyramidKV):
        same = XKV(fraction=config.fraction, rule="pyramid", window=config.window, pool=config.pool, sinks=0)
        super().__init__(place, same)
        assert self.watcher is not None
        self.keeper = CappedKeeper(self.watcher, self.store, config.window)
