"""Copies of disk pages in host memory, shared by all layers of one cache, and rows read through them.

In: page numbers and row offsets in them. Out: rows, from a copy or from disk; at once, or planned and brought later.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.math.pages import Located, locate
from farkv.store.far.in_flight import Plan
from farkv.store.far.page_memory import PageMemory
from farkv.store.memory import PageMover


class PageCache(PageMemory):
    """Rows of pages by way of their copies.

    Each read is a plan, which gives missing pages slots and names them, and what brings it: bytes. Tables change on the
    thread that plans and on no other, so what is in memory at the next choice does not depend on how fast a disk was.
    """

    def find(self, pages: Int[Tensor, "*at"]) -> Int[Tensor, "*at"]:
        """Return the slots of pages, -1 for those that are only on disk."""
        self.slots.know(self.pages.count)
        return self.slots.slot_of[pages]

    def resident(self, pages: Int[Tensor, "*at"]) -> Bool[Tensor, "*at"]:
        """Return which pages have a copy, or have one planned."""
        with self.lock:
            self._mend()
            return self.find(pages) >= 0

    def take(self, pages: Int[Tensor, " N"], offsets: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy row `offsets[j]` of page `pages[j]` into `out[j]`, reading pages without a copy from disk.

        Cost: N rows read and written, and the bytes of every page read from disk, straight into their slots.

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        self._take(lambda: self._locate(pages, offsets), out)

    def plan_rows(self, table: Int[Tensor, "H P"], heads: Tensor, positions: Int[Tensor, " N"]) -> Plan:
        """Decide where the rows at positions[j] of heads heads[j] will be, and give their pages slots.

        `bring` reads them; `end` is due when that was waited for. `table` names every head's pages.

        Cost: a few operations a row; no byte is read.
        """
        with self.lock:
            return self._plan(lambda: self._locate_rows(table, heads, positions))

    def _take(self, locate_again: Callable[[], Located], out: Tensor) -> None:
        with self.lock:
            self.settle()
            plan = self._plan(locate_again)
            try:
                self.bring(plan, out)
            finally:
                self.end(plan)

    def _locate(self, pages: Tensor, offsets: Tensor) -> Located:
        self.slots.know(self.pages.count)
        return locate(pages, offsets, self.slots.slot_of)

    def _locate_rows(self, table: Tensor, heads: Tensor, positions: Tensor) -> Located:
        tokens = self.pages.form.tokens
        if not isinstance(self.mover, PageMover):
            return self._locate(table.view(-1)[heads * table.shape[1] + positions // tokens], positions % tokens)
        self.slots.know(self.pages.count)
        return self.mover.locate(table, self.slots.slot_of, heads, positions, tokens)

    def _plan(self, locate_again: Callable[[], Located]) -> Plan:
        """Give missing pages slots, as many as can be had without those that rows are in, or will be."""
        self._mend()
        rows = locate_again()
        self.slots.now += 1
        try:
            slots, missing = rows.slots, (rows.slots < 0).nonzero()[:, 0]
            wanted = rows.pages[missing]
            places = self._find_places(len(wanted), slots[slots >= 0])
            n = len(places)
            # One that reads nothing has nothing to wait for.
            plan = Plan(locate_again, rows, slots, wanted[:n], places, wanted[n:], is_filled=n == 0)
            self.in_flight.plans.append(plan)
            if len(wanted):
                plan.slots = slots.index_copy(0, missing, torch.cat([places, -2 - torch.arange(len(wanted) - n)]))
            self.slots.name(plan.pages, places)
            here = plan.slots >= 0
            self.slots.touch(plan.slots[here], rows.counts[here] / self.pages.form.tokens)
        except BaseException:
            # A slot may be named that nothing will be read into.
            self.in_flight.failed = True
            raise
        return plan

    def _find_places(self, n: int, taken: Tensor) -> Tensor:
        if n == 0:
            return torch.empty(0, dtype=torch.int64)
        closed = torch.zeros(len(self.slots.page_of), dtype=torch.bool)
        closed[self.used :] = True
        closed[taken] = True
        self.in_flight.close(closed)
        return self._free_slots(n, closed)

    def bring(self, plan: Plan, out: Tensor) -> None:
        """Read what a plan lacks and copy its rows into `out`; on any thread.

        Raises:
            StoreError: a page is damaged or cannot be read; every copy is dropped.
        """
        flight = self.in_flight
        try:
            with flight.moving:
                is_good = not (plan.is_void or flight.failed)
                if is_good:
                    # Its rows may be in slots that a plan before it was to fill.
                    for each in (*flight.plans, plan):
                        self._fill(each)
                        if each is plan:
                            break
                    self._copy(plan, out)
        except BaseException:
            with self.lock:
                self._mend()
            raise
        if not is_good:
            # Slots were dropped since it was planned.
            self._take(plan.locate, out)
        elif len(plan.passing):
            with self.lock:
                self._pass_through(plan, out)

    def end(self, plan: Plan) -> None:
        """Note that a plan's rows were waited for: others may have its slots."""
        with self.lock:
            if not (plan.is_filled or plan.is_void):
                # Its slots are named. A thread that comes to it late must not write there: they will be others'.
                plan.is_void = self.in_flight.failed = True
            self.in_flight.forget(plan)

    def rest(self) -> None:
        """Note that nothing is on its way any more."""
        with self.lock:
            for plan in list(self.in_flight.plans):
                self.end(plan)

    def settle(self) -> None:
        """Read what is planned: afterwards every named slot holds its page. The caller has the lock."""
        self._mend()
        for plan in list(self.in_flight.plans):
            with self.in_flight.moving:
                if not plan.is_void:
                    self._fill(plan)

    def _fill(self, plan: Plan) -> None:
        if plan.is_filled:
            return
        try:
            self.pages.read(plan.pages, self.data, plan.places)
        except BaseException:
            # What these slots hold is not known. Copies lose nothing.
            self.in_flight.failed = True
            raise
        plan.is_filled = True

    def _copy(self, plan: Plan, out: Tensor) -> None:
        """Copy the rows that are in slots."""
        slots, offsets, width, here = plan.slots[plan.rows.which], plan.rows.offsets, self.pages.form.width, None
        if len(plan.passing):
            here = (slots >= 0).nonzero()[:, 0]
            slots, offsets = slots[here], offsets[here]
        if len(slots) == 0:
            return
        rows = out if here is None else torch.empty(len(slots), width, dtype=out.dtype)
        if self.mover is not None:
            self.mover.gather(self.data[None], slots, offsets.contiguous(), rows)
        else:
            torch.index_select(self.data.view(-1, width), 0, slots * self.pages.form.tokens + offsets, out=rows)
        if here is not None:
            out[here] = rows

    def _pass_through(self, plan: Plan, out: Tensor) -> None:
        """Copy rows of pages that no slot can be had for, read through the scratch area."""
        form, start, slots = self.pages.form, 0, plan.slots[plan.rows.which]
        places = (slots < 0).nonzero()[:, 0]
        which, offsets = -2 - slots[places], plan.rows.offsets[places]
        for rows in self.load(plan.passing):
            mine = ((which >= start) & (which < start + len(rows))).nonzero()[:, 0]
            at = (which[mine] - start) * form.tokens + offsets[mine]
            out[places[mine]] = rows.view(-1, form.width).index_select(0, at)
            start += len(rows)
