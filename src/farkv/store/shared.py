"""What all caches of one handle hold, and were promised, of the same near and host memory.

In: a cache's ledgers, opened here. Out: what the others hold, and room that they give back: they keep their records,
but copies of records, which a step can bring again, make room for another cache's needs.
"""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from farkv.store.ledger import Ledger, refuse


class Holder(Protocol):
    """The store of one cache, as others see it."""

    host: Ledger
    near: Ledger
    shared: Shared

    def give_back(self, tier: str, n_bytes: int) -> None:
        """Drop copies of records: at least `n_bytes` of them in this tier, or all."""
        ...


class Others(NamedTuple):
    """What other caches hold of one tier, or were promised: firmly, and as copies; how many of them have copies."""

    held: int = 0
    copies: int = 0
    n_copying: int = 0


class Shared:
    """The near and host limits of one handle, under which all its caches are."""

    def __init__(self, near: int | None = None, host: int | None = None):
        self.near, self.host = Ledger("near", near, is_shared=True), Ledger("host", host, is_shared=True)
        # One admission at a time: between what it reads and what it is promised nothing may change.
        self.admitting = threading.RLock()
        self._holders: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self  # of the handle, not of a cache

    def open_ledger(self, tier: str, limit: int | None) -> Ledger:
        """Open a cache's own ledger of a tier; without a limit for all there is nothing to share."""
        whole: Ledger = getattr(self, tier)
        return Ledger(tier, limit, None if whole.limit is None else whole)

    def add(self, holder: Holder) -> None:
        """Note who can give copies back, as long as it lives."""
        self._holders.add(holder)

    def count_others(self, holder: Holder, tier: str) -> Others:
        """Return what the other caches hold of a tier."""
        whole, own = getattr(self, tier), getattr(holder, tier)
        held = whole.used - own.counted if own.parent is whole else 0
        if not held:
            return Others()
        copies = [getattr(other, tier).copies for other in self._list_others(holder)]
        return Others(held - sum(copies), sum(copies), sum(n > 0 for n in copies))

    def reclaim(self, holder: Holder, tier: str, n_bytes: int) -> None:
        """Let others give copies back until this tier has room for `n_bytes` more; those with most of them first."""
        whole: Ledger = getattr(self, tier)
        others = self._list_others(holder)
        for other in sorted(others, key=lambda each: -getattr(each, tier).copies):
            missing = n_bytes - (n_bytes if whole.free is None else whole.free)
            if missing <= 0:
                return
            other.give_back(tier, missing)

    def _list_others(self, holder: Holder) -> list[Any]:
        return [other for other in list(self._holders) if other is not holder]


def copy_store(store: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a cache's store, once it is known that every tier has room for it.

    Raises:
        CapacityError: with the bytes, the limit and the remedy; nothing is copied.
    """
    shared: Shared = store.shared
    sets = list(store.recently_used.values())
    with shared.admitting:
        store.near.uncopied = sum(each.rows.n_bytes for each in sets)
        store.home.uncopied = sum(each.size.metadata_bytes for each in sets)
        store.home.uncopied += 0 if store.page_cache is None else store.page_cache.n_bytes
        for ledger in (store.host, store.near):
            whole = ledger.parent
            if whole is None or not whole.is_shared:
                continue
            # What its next pass needs besides, that pass will ask for.
            needed = ledger.used - ledger.uncopied
            if not whole.has_room(needed):
                # A cache that was dropped may still wait for the collector.
                gc.collect()
                shared.reclaim(store, ledger.tier, needed)
            if not whole.has_room(needed):
                raise refuse(whole.tier, whole.limit or 0, needed, "a copy of a cache", whole.used)
        twin = memo[id(store)] = object.__new__(type(store))
        for name, value in vars(store).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        # Copies are not copied: they have given their bytes back.
        twin.recently_used = {}
        shared.add(twin)
    return twin
