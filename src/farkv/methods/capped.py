"""The keep lever under a hard cap: the window that always stays never takes more than half of what is kept.

In: a watcher, a store. Out: how many records stay, and which, for SnapKV, PyramidKV and H2O.
"""

from __future__ import annotations

from farkv.methods.keep import Keeper
from farkv.methods.watch import Watcher
from farkv.store.sizes import count_cap
from farkv.store.tiers import Tiers


class CappedKeeper(Keeper):
    """What may be kept of one cache where `fraction` binds however short the context is.

    Args:
        most: newest records that always stay; None: as many as their share allows.
        share: of the cap, that they take at most.
    """

    def __init__(self, watcher: Watcher, store: Tiers, most: int | None, share: float = 0.5):
        super().__init__(watcher, None, store, 0)
        self.most, self.share = most, share

    def count_recent(self, tokens: int) -> int:
        """Return the newest records that always stay: `most`, or a share of the cap where that is less."""
        cap = count_cap(self.config.need_fraction, tokens)
        # One record besides is the newest token, while it is read.
        share = min(int(self.share * cap), cap - 1)
        return max(1, share if self.most is None else min(share, self.most))
