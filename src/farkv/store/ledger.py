"""Counts the bytes of one tier and refuses what would exceed its limit.

In: charges and releases, in bytes. Out: `used`, `peak`, or a CapacityError before anything is allocated.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from farkv.config import format_bytes
from farkv.errors import CapacityError


class Ledger:
    """The byte count of one tier (`near`, `host`, `disk` or `index`), which may count against a parent's too."""

    def __init__(self, tier: str, limit: int | None = None, parent: Ledger | None = None):
        self.tier, self.limit, self.parent = tier, limit, parent
        self.used = 0
        self.peak = 0
        # The link's thread also charges.
        self._lock = threading.RLock()
        # Whether growing rows may take more than they need; False where other layers still need the rest.
        self.roomy = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        twin = memo[id(self)] = Ledger(self.tier, self.limit, copy.deepcopy(self.parent, memo))
        twin.used, twin.peak, twin.roomy = self.used, self.peak, self.roomy
        return twin

    def has_room(self, n_bytes: int) -> bool:
        """Return whether `n_bytes` more fit this tier and its parent."""
        fits = self.limit is None or self.used + n_bytes <= self.limit
        return fits and (self.parent is None or self.parent.has_room(n_bytes))

    def charge(self, n_bytes: int) -> None:
        """Add `n_bytes` to the tier and its parent.

        Raises:
            CapacityError: they do not fit; nothing is added.
        """
        with self._lock:
            if not self.has_room(n_bytes):
                raise self.refuse(n_bytes, "this step")
            if self.parent is not None:
                self.parent.charge(n_bytes)
            self.used += n_bytes
            self.peak = max(self.peak, self.used)

    def release(self, n_bytes: int) -> None:
        """Subtract `n_bytes`."""
        with self._lock:
            assert 0 <= n_bytes <= self.used
            if self.parent is not None:
                self.parent.release(n_bytes)
            self.used -= n_bytes

    def refuse(self, n_bytes: int, purpose: str) -> CapacityError:
        """Return the error for `n_bytes` that do not fit."""
        top = self if self.limit is not None or self.parent is None else self.parent
        return refuse(top.tier, top.limit or 0, top.used + n_bytes, purpose)


def refuse(tier: str, limit: int, needed: int, purpose: str) -> CapacityError:
    """Return the error for bytes that exceed a tier's limit."""
    return CapacityError(
        f"{tier} limit: {purpose} needs {needed:,} bytes ({format_bytes(needed)}), the limit is "
        f"{limit:,} ({format_bytes(limit)}); raise --{tier} to at least {needed}, or shorten the context"
    )
