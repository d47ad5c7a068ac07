"""Memory for copies of disk pages: slots in one mapping, as many as the host limit allows, counted by its ledger.

In: room, pages that were just written. Out: slots, and pages read through a scratch area. Dropping a copy loses
nothing: every page is on disk. Knows pages, not tokens or layers.
"""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.eviction import Policy
from farkv.store.far.in_flight import InFlight
from farkv.store.far.page_slots import PageSlots
from farkv.store.far.pages import NumberedPages
from farkv.store.ledger import Ledger
from farkv.store.memory import Mover, grow_mapping

# Pages read from disk at a time, through a scratch area.
SCRATCH_PAGES = 64
# Fewer would work, but read the same pages again and again.
LEAST_PAGES, LEAST_SCRATCH = 8, 4


class PageMemory:
    """Slots for page copies in one memory mapping, of which `room` may be used; unused ones take no memory."""

    def __init__(self, ledger: Ledger, policy: Policy, pages: NumberedPages, mover: Mover | None = None):
        self.ledger, self.policy, self.pages, self.mover = ledger, policy, pages, mover
        # Of the tables: the link's thread fetches while the model's thread appends and plans.
        self.lock = threading.RLock()
        self.in_flight = InFlight()
        self.room = 0
        # Pages read from disk at a time.
        self.piece = SCRATCH_PAGES
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> PageMemory:
        # Page copies are not copied: the twin reads its own from disk and charges them to its own ledger.
        with self.lock:
            twin = type(self)(
                copy.deepcopy(self.ledger, memo), self.policy, copy.deepcopy(self.pages, memo), self.mover
            )
            twin.ledger.release(self.n_bytes)
            twin.resize(self.room, self.piece)
        return twin

    @property
    def n_bytes(self) -> int:
        """Bytes of used slots and scratch, as charged."""
        scratch = 0 if self.scratch is None else self.scratch.numel() * self.scratch.element_size()
        return self.used * self.pages.form.n_bytes + scratch

    @property
    def used(self) -> int:
        """Slots that hold a page."""
        return self.slots.used

    def _forget(self) -> None:
        self.data = torch.empty(0)
        self.memory: mmap.mmap | None = None
        self.scratch: Tensor | None = None
        self.slots = PageSlots(self.policy)

    def resize(self, room: int, piece: int = SCRATCH_PAGES) -> None:
        """Allow `room` slots, and `piece` pages read at a time; free what is beyond."""
        with self.lock:
            self._drop(self.used - room)
            self.room, self.piece = room, piece
            if self.scratch is not None and len(self.scratch) > piece:
                self.ledger.release(self.scratch.numel() * self.scratch.element_size())
                self.scratch = None
            if room > len(self.slots.page_of):
                self._map(room)

    def make_room(self, n_bytes: int) -> None:
        """Drop copies until the ledger has room for `n_bytes`, or none is left."""
        with self.lock:
            free = self.ledger.free
            if free is not None:
                self._drop(-((free - n_bytes) // self.pages.form.n_bytes))

    def give_back(self, n_bytes: int) -> None:
        """Give room for copies to another cache, all but the least that reading needs."""
        page_bytes = self.pages.form.n_bytes
        with self.lock:
            n = max(0, min(-(-n_bytes // page_bytes), self.room - LEAST_PAGES, self.ledger.copies // page_bytes))
            # Between passes only what is used is counted; in one, all that there is room for.
            at_rest = self.ledger.promised == 0
            self.resize((min(self.room, self.used) if at_rest else self.room) - n, self.piece)
            promised = max(0, self.ledger.promised - n * page_bytes)
            self.ledger.promise(promised, self.ledger.copies - n * page_bytes)

    def _drop(self, n: int) -> None:
        """Free the last `n` used slots, or all; all where some have names and not yet their pages."""
        if n <= 0 or self.used == 0:
            return
        n = self.used if self.in_flight.is_open else n
        n_bytes, left, n_used = self.pages.form.n_bytes, max(0, self.used - n), self.used
        # A deliberate wait: rows of these slots may be on their way.
        with self.in_flight.moving:
            # Until names are gone and plans are void: whoever is stopped half way drops the rest next time.
            self.in_flight.failed = True
            try:
                self.slots.drop(left)
                first = -(-left * n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                if self.memory is not None and first < len(self.memory):
                    self.memory.madvise(mmap.MADV_DONTNEED, first)
                self.in_flight.void()
            finally:
                self.ledger.release((n_used - self.used) * n_bytes)

    def _mend(self) -> None:
        """Drop every copy after a read that failed."""
        if self.in_flight.failed:
            self._drop(self.used)
            self.in_flight.void()

    def _map(self, n: int) -> None:
        """Map memory for `n` slots; untouched pages of it take none."""
        form = self.pages.form
        with self.in_flight.moving:
            self.memory = grow_mapping(self.memory, n * form.n_bytes)
            self.data = torch.frombuffer(self.memory, dtype=form.dtype).view(n, form.tokens, form.width)
            self.slots.grow(n)

    def load(self, pages: Int[Tensor, " N"]) -> Iterator[Tensor]:
        """Read pages from disk and yield their rows piece by piece, each valid until the next is requested.

        Raises:
            CapacityError: there is no room for the scratch area, even without copies.
            StoreError: a page is damaged or cannot be read.
        """
        form = self.pages.form
        if self.scratch is None:
            self.make_room(self.piece * form.n_bytes)
            self.ledger.charge(self.piece * form.n_bytes)
            self.scratch = torch.empty(self.piece, form.tokens, form.width, dtype=form.dtype)
        for part in pages.split(len(self.scratch)):
            rows = self.scratch[: len(part)]
            self.pages.read(part, rows)
            yield rows

    def offer(self, first: int, rows: Tensor) -> None:
        """Keep copies of pages that were just written, numbered from `first`, while slots are free."""
        with self.lock:
            n = min(len(rows), self.room - self.used)
            if n > 0:
                self.slots.know(self.pages.count)
                self._place(torch.arange(first, first + n), rows[:n])

    def _place(self, pages: Tensor, rows: Tensor) -> None:
        """Copy pages into slots that nothing is in; only the first pages where not all fit."""
        slots = self._free_slots(len(pages), torch.ones(len(self.slots.page_of), dtype=torch.bool))
        # In this order: where it is stopped, no page is said to be where it is not.
        self.data[slots] = rows[: len(slots)]
        self.slots.name(pages[: len(slots)], slots)

    def _free_slots(self, n: int, closed: Tensor) -> Tensor:
        """Return up to `n` slots that no page has any more, unused ones first; none of those that are closed."""
        form = self.pages.form
        fresh = max(0, min(n, self.room - self.used))
        while fresh and not self.ledger.has_room(fresh * form.n_bytes):
            fresh -= 1
        n_victims = min(n - fresh, len(closed) - int(closed.sum()))
        self.ledger.charge(fresh * form.n_bytes)
        self.slots.used += fresh
        slots = torch.arange(self.used - fresh, self.used)
        if n_victims > 0:
            slots = torch.cat([slots, self.slots.take_victims(n_victims, closed)])
        return slots

    def clear(self) -> None:
        """Free every copy."""
        with self.lock, self.in_flight.moving:
            n_bytes, self.in_flight.failed = self.n_bytes, True
            self._forget()
            self.ledger.release(n_bytes)
            self.in_flight.void()
            if self.room:
                self._map(self.room)
