"""Rows of pages that were asked for and are not there yet: planned on one thread, brought on another.

A plan says into which slots missing pages go, and names them at once: the next choice knows what will be in memory and
need not wait for it. Bytes follow later, brought by whoever comes first: the thread that fetches, or one that needs
these slots now. Where slots are dropped meanwhile, a plan is void, and its rows are asked for again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from farkv._axes import Bool, Int, Tensor
from farkv.math.pages import Located


@dataclass(eq=False)
class Plan:
    """Where rows will be, and which pages are read for them.

    slots: of each located page; -2 - j: it is passing page j.
    """

    # Finds the rows again.
    locate: Callable[[], Located]
    rows: Located
    slots: Int[Tensor, " U"]
    # Pages, and the slots that they are read into; pages that no slot could be had for.
    pages: Int[Tensor, " M"]
    places: Int[Tensor, " M"]
    passing: Int[Tensor, " P"]
    is_filled: bool = False
    is_void: bool = False


class OpenRows(NamedTuple):
    """Rows of the open page, the places that they belong to, and the places of all others."""

    places: Int[Tensor, " A"]
    rows: Tensor
    others: Int[Tensor, " E"]


class Coming(NamedTuple):
    """Rows that are asked for: those of full pages, and what is at hand already."""

    plan: Plan | None
    open: OpenRows | None


class InFlight:
    """The plans of one page cache that nobody has waited for."""

    def __init__(self) -> None:
        # Held while slots are written or read. Taken after the page cache's own lock, never before it.
        self.moving = threading.RLock()
        self.plans: list[Plan] = []
        # A read failed: what is in the slots that were named for it is not known.
        self.failed = False

    @property
    def is_open(self) -> bool:
        """Say whether slots are named that do not hold their pages."""
        return self.failed or not all(plan.is_filled for plan in self.plans)

    def close(self, closed: Bool[Tensor, " S"]) -> None:
        """Mark the slots that plans will read."""
        for plan in self.plans:
            closed[plan.slots[plan.slots >= 0]] = True

    def void(self) -> None:
        """Let every plan be made again: slots were dropped, and their names before them."""
        for plan in self.plans:
            plan.is_void = True
        self.plans = []
        # Last: whoever is stopped before has not done it.
        self.failed = False

    def forget(self, plan: Plan) -> None:
        """Note that a plan's rows were waited for."""
        if plan in self.plans:
            self.plans.remove(plan)
