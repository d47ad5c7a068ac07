"""The thread that brings records near: one for all caches of an attached model, started before it is needed.

In: work. Out: its future. A thread that cannot be started (too many processes, no address space) is then refused where
nothing was read yet, not in the middle of a pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from farkv.errors import CapacityError


class Worker:
    """One thread, which does its work in the order in which it was submitted, and ends with the last who holds it.

    Raises:
        CapacityError: the system refuses a thread.
    """

    def __init__(self) -> None:
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Worker:
        return self

    def _start(self) -> None:
        self._pool, self.process = ThreadPoolExecutor(1, thread_name_prefix="farkv-link"), os.getpid()
        try:
            self._pool.submit(int).result()
        except RuntimeError as error:
            self.process = 0
            raise CapacityError(
                f"link: expected to start a thread, which brings records near, the system refuses it ({error}); allow "
                "this process more threads or memory"
            ) from error

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the thread do some work.

        Raises:
            CapacityError: this is a forked process, which has none of its parent's threads, and it gets none.
        """
        if self.process != os.getpid():
            self._start()
        return self._pool.submit(work)
