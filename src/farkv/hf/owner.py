"""Whose a cache is: one thread's at a time, as with a connection of sqlite3.

In: the thread that wants to use it. Out: nothing, or a refusal. Two threads that take turns on one cache would each go
on from the other's tokens, and every answer would be wrong without a sign.
"""

from __future__ import annotations

import threading
from typing import Any

from farkv.errors import CacheStateError


class Owner:
    """The thread that uses one cache: the first that does, until it ends or hands the cache over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner()

    def check(self) -> None:
        """Take the cache for this thread, or refuse it.

        Raises:
            CacheStateError: another thread, which still runs, has it.
        """
        me = threading.current_thread()
        if self._thread is me:
            return
        with self._lock:
            other = self._thread
            if other is not None and other is not me and other.is_alive():
                raise CacheStateError(
                    f"this cache: expected the thread that uses it, {other.name!r}, got {me.name!r}; make a cache for "
                    "each thread, or call hand_over() in the first one when it is done with it"
                )
            self._thread = me

    def is_here(self) -> bool:
        """Say whether this thread has the cache."""
        return self._thread is threading.current_thread()

    def hand_over(self) -> None:
        """Let the thread that uses the cache next have it."""
        self.check()
        self._thread = None
