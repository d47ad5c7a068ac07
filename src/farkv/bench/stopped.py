"""A measurement that Ctrl-C ends: what was finished is kept. In: a list that grows. Out: a report of what is in it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

R = TypeVar("R")


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a measurement of which some was finished: `report` has it."""

    def __init__(self, report: Any):
        super().__init__()
        self.report = report


class Keep(AbstractContextManager["Keep"]):
    """Ends a block at Ctrl-C where something was finished in it; `give` then raises what there is."""

    def __init__(self, finished: list[Any]):
        self._finished = finished
        self.cause: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, KeyboardInterrupt) and self._finished:
            self.cause = error
        return self.cause is not None

    def give(self, report: R) -> R:
        """Return a report, or raise it.

        Raises:
            Stopped: it is not whole.
        """
        if self.cause is not None:
            raise Stopped(report) from self.cause
        return report
