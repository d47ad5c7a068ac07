"""Counts the bytes of one tier and refuses what would exceed its limit.

In: charges, releases and promises, in bytes. Out: `used`, `peak`, or a CapacityError before anything is allocated.

A ledger may count against a parent's too: an index against near memory, a cache's host memory against that of all
caches of its handle. The parent counts what is used, or what was promised where that is more: what was promised is
there when it is asked for, whatever other caches do meanwhile.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

from farkv.config import format_bytes
from farkv.errors import CapacityError


class Ledger:
    """The byte count of one tier (`near`, `host`, `disk` or `index`), which may count against a parent's too.

    Args:
        is_shared: of several caches, so a copied cache counts here once more; bytes that a cache was still holding when
            it was dropped are given back.
    """

    def __init__(self, tier: str, limit: int | None = None, parent: Ledger | None = None, *, is_shared: bool = False):
        self.tier, self.limit, self.parent, self.is_shared = tier, limit, parent, is_shared
        self.used = 0
        self.peak = 0
        # Bytes that this ledger can count on; those of them that are only for copies, which can be given back.
        self.promised = self.copies = 0
        # While a cache is copied: used bytes of what is not copied with it.
        self.uncopied = 0
        # What the parent counts of this one. A list, for the finalizer, which must not know the ledger.
        self._counted = [0]
        if parent is not None and parent.is_shared:
            weakref.finalize(self, _give_back, parent, self._counted).atexit = False
        # The link's thread also charges.
        self._lock = threading.RLock()
        # Whether growing rows may take more than they need; False where other layers still need the rest.
        self.roomy = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        if self.is_shared:
            return self
        twin = memo[id(self)] = Ledger(self.tier, self.limit, copy.deepcopy(self.parent, memo))
        if twin.parent is not None and twin.parent is self.parent:
            # A shared parent counts both. What is not copied gives its bytes back to the twin, one by one.
            twin._tell(self.used - self.uncopied, 0)
        else:
            twin.promised, twin._counted[0] = self.promised, self._counted[0]
        twin.used, twin.peak, twin.roomy = self.used, self.peak, self.roomy
        return twin

    # --- what there is --------------------------------------------------------------------------------------

    @property
    def counted(self) -> int:
        """Bytes that the parent counts of this ledger: used or promised ones."""
        return self._counted[0]

    @property
    def free(self) -> int | None:
        """Bytes that may still be charged here; None where nothing limits them."""
        own = None if self.limit is None else self.limit - self.used
        above = None if self.parent is None else self.parent.free
        if above is None:
            return own
        # What was promised is counted above already.
        above += self._counted[0] - self.used
        return above if own is None else min(own, above)

    def has_room(self, n_bytes: int) -> bool:
        """Return whether `n_bytes` more fit this tier and its parent."""
        free = self.free
        return free is None or n_bytes <= free

    # --- taking and giving ------------------------------------------------------------------------------------

    def charge(self, n_bytes: int) -> None:
        """Add `n_bytes` to the tier and its parent.

        Raises:
            CapacityError: they do not fit; nothing is added.
        """
        with self._lock:
            if not self.has_room(n_bytes):
                raise self.refuse(n_bytes, "this step")
            self._tell(self.used + n_bytes, self.promised)
            self.used += n_bytes
            self.peak = max(self.peak, self.used)

    def release(self, n_bytes: int) -> None:
        """Subtract `n_bytes`."""
        with self._lock:
            assert 0 <= n_bytes <= self.used
            # Less than that is counted only while a cache is copied.
            if max(self.used - n_bytes, self.promised) < self._counted[0] or self.parent is None:
                self._tell(self.used - n_bytes, self.promised)
            self.used -= n_bytes

    def promise(self, n_bytes: int, copies: int = 0) -> None:
        """Let the parent keep room for `n_bytes` in all, used ones included, in place of what was promised before.

        Args:
            copies: how many of them are only for copies.

        Raises:
            CapacityError: the parent cannot; nothing has changed.
        """
        with self._lock:
            self._tell(self.used, n_bytes)
            self.promised, self.copies = n_bytes, copies

    def _tell(self, used: int, promised: int) -> None:
        """Let the parent count what this ledger comes to."""
        if self.parent is None:
            return
        more = max(used, promised) - self._counted[0]
        if more > 0:
            self.parent.charge(more)
        elif more < 0:
            self.parent.release(-more)
        self._counted[0] += more

    # --- refusing ---------------------------------------------------------------------------------------------

    def refuse(self, n_bytes: int, purpose: str) -> CapacityError:
        """Return the error for `n_bytes` that do not fit."""
        above = self.parent
        if above is None or (self.limit is not None and self.used + n_bytes > self.limit):
            return refuse(self.tier, self.limit or 0, self.used + n_bytes, purpose)
        if not above.is_shared:
            return above.refuse(n_bytes, purpose)
        others = above.used - self._counted[0]
        return refuse(above.tier, above.limit or 0, self.used + n_bytes, purpose, others)


def _give_back(parent: Ledger, counted: list[int]) -> None:
    parent.release(counted[0])
    counted[0] = 0


def refuse(tier: str, limit: int, needed: int, purpose: str, others: int = 0) -> CapacityError:
    """Return the error for bytes that exceed a tier's limit.

    Args:
        others: bytes of the limit that other caches of the same handle hold, or were promised.
    """
    beside, remedy = "", ""
    if others:
        beside = f", and other caches of this model hold {others:,} ({format_bytes(others)}) of it"
        remedy = "drop or reset() those, "
    total = needed + others
    return CapacityError(
        f"{tier} limit: {purpose} needs {needed:,} bytes ({format_bytes(needed)}), the limit is "
        f"{limit:,} ({format_bytes(limit)}){beside}; {remedy}raise --{tier} to at least {total}, or shorten the context"
    )
