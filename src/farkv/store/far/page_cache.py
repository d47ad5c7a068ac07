"""Copies of disk pages in host memory: as many as the host limit allows, shared by all layers of one cache.

In: page numbers and row offsets in them. Out: rows, from a cached copy or from disk. Evicting a copy loses nothing:
every page is on disk. Knows pages, not tokens or layers.
"""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.far.eviction import Policy, Uses
from farkv.store.far.pages import NumberedPages
from farkv.store.ledger import Ledger
from farkv.store.memory import Mover, PageMover, grow_mapping

# Pages read from disk at a time, through a scratch area.
SCRATCH_PAGES = 64
# Fewer would work, but read the same pages again and again.
LEAST_PAGES, LEAST_SCRATCH = 8, 4


class PageCache:
    """Slots for page copies in one memory mapping, of which `room` may be used; unused ones take no memory."""

    def __init__(self, ledger: Ledger, policy: Policy, pages: NumberedPages, mover: Mover | None = None):
        self.ledger, self.policy, self.pages, self.mover = ledger, policy, pages, mover
        # The link's thread fetches while the model's thread appends.
        self.lock = threading.RLock()
        self.room = self.used = self.now = 0
        # Pages read from disk at a time.
        self.piece = SCRATCH_PAGES
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> PageCache:
        # Page copies are not copied: the twin reads its own from disk and charges them to its own ledger.
        with self.lock:
            twin = PageCache(copy.deepcopy(self.ledger, memo), self.policy, copy.deepcopy(self.pages, memo), self.mover)
            twin.ledger.release(self.n_bytes)
            twin.resize(self.room, self.piece)
        return twin

    @property
    def n_bytes(self) -> int:
        """Bytes of used slots and scratch, as charged."""
        scratch = 0 if self.scratch is None else self.scratch.numel() * self.scratch.element_size()
        return self.used * self.pages.form.n_bytes + scratch

    def _forget(self) -> None:
        self.data = torch.empty(0)
        self.memory: mmap.mmap | None = None
        self.scratch: Tensor | None = None
        # The slot of every page, -1 without one; the page of every slot.
        self.slot_of = torch.empty(0, dtype=torch.int32)
        self.page_of = torch.empty(0, dtype=torch.int64)
        self.births = torch.empty(0, dtype=torch.int32)
        self.uses: Uses | None = None

    def resize(self, room: int, piece: int = SCRATCH_PAGES) -> None:
        """Allow `room` slots, and `piece` pages read at a time; free what is beyond."""
        with self.lock:
            self._drop(self.used - room)
            self.room, self.piece = room, piece
            if self.scratch is not None and len(self.scratch) > piece:
                self.ledger.release(self.scratch.numel() * self.scratch.element_size())
                self.scratch = None
            if room > len(self.page_of):
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
        """Free the last `n` used slots, or all."""
        if n <= 0 or self.used == 0:
            return
        n_bytes, left = self.pages.form.n_bytes, max(0, self.used - n)
        self._unname(slice(left, self.used))
        self.page_of[left:] = -1
        first = -(-left * n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.memory is not None and first < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, first)
        self.ledger.release((self.used - left) * n_bytes)
        self.used = left

    def _map(self, n: int) -> None:
        """Map memory for `n` slots; untouched pages of it take none."""
        form = self.pages.form
        self.memory = grow_mapping(self.memory, n * form.n_bytes)
        data = torch.frombuffer(self.memory, dtype=form.dtype).view(n, form.tokens, form.width)
        page_of = torch.full((n,), -1, dtype=torch.int64)
        births = torch.zeros(n, dtype=torch.int32)
        page_of[: self.used], births[: self.used] = self.page_of[: self.used], self.births[: self.used]
        uses = self.policy.start((n,), self.now, torch.device("cpu"))
        self.data, self.page_of, self.births = data, page_of, births
        if self.uses is not None:
            uses.values[: self.used] = self.uses.values[: self.used]
            uses.hand.copy_(self.uses.hand)
        self.uses = uses

    def find(self, pages: Int[Tensor, "*at"]) -> Int[Tensor, "*at"]:
        """Return the slots of pages, -1 for those that are only on disk."""
        self._know_all()
        return self.slot_of[pages]

    def _know_all(self) -> None:
        """Make the table of slots as long as there are pages."""
        if self.pages.count > len(self.slot_of):
            grown = torch.full((self.pages.count * 5 // 4 + 64,), -1, dtype=torch.int32)
            grown[: len(self.slot_of)] = self.slot_of
            self.slot_of = grown

    def take(self, pages: Int[Tensor, " N"], offsets: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy row `offsets[j]` of page `pages[j]` into `out[j]`, reading pages without a copy from disk.

        Cost: N rows read and written, and the bytes of every page read from disk, straight into their slots.

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        with self.lock:
            slots = self.find(pages).long()
            missing = (slots < 0).nonzero()[:, 0]
            wanted, which = pages[missing].unique(return_inverse=True)
            slots[missing] = -2 - which
            self._take(slots, offsets, wanted, out)

    def take_rows(self, table: Int[Tensor, "H P"], heads: Tensor, positions: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy the row at positions[j] of head heads[j] into out[j]; `table` names every head's pages. As `take`."""
        tokens = self.pages.form.tokens
        with self.lock:
            if isinstance(self.mover, PageMover):
                self._know_all()
                self._take(*self.mover.locate(table, self.slot_of, heads, positions, tokens), out)
            else:
                self.take(table.view(-1)[heads * table.shape[1] + positions // tokens], positions % tokens, out)

    def _take(self, slots: Tensor, offsets: Tensor, wanted: Tensor, out: Tensor) -> None:
        """Copy rows of slots, -2 - j for one of wanted[j], which is read."""
        self.now += 1
        if len(wanted) == 0:
            self._copy(slots, offsets, None, out)
            return
        filled = self._fill(wanted, slots)
        found = torch.cat([filled, filled.new_full((len(wanted) - len(filled),), -1)])
        which = (-2 - slots).clamp_min(0)
        known = torch.where(slots < 0, found[which], slots)
        if len(filled) == len(wanted):
            self._copy(known, offsets, None, out)
            return
        self._copy(known, offsets, (known >= 0).nonzero()[:, 0], out)
        left = (known < 0).nonzero()[:, 0]
        self._pass_through(wanted[len(filled) :], which[left] - len(filled), offsets[left], (out, left))

    def _fill(self, wanted: Tensor, slots: Tensor) -> Tensor:
        """Read pages into slots, as many as can be had without those of `slots`; return the first pages' slots."""
        open_ = torch.zeros(len(self.page_of), dtype=torch.bool)
        open_[: self.used] = True
        open_[slots[slots >= 0]] = False
        taken = self._free_slots(len(wanted), ~open_)
        pages = wanted[: len(taken)]
        try:
            self.pages.read(pages, self.data, taken)
            self._name(pages, taken)
        except BaseException:
            # What these slots hold is not known. Copies lose nothing.
            self._drop(self.used)
            raise
        return taken

    def _pass_through(self, pages: Tensor, which: Tensor, offsets: Tensor, to: tuple[Tensor, Tensor]) -> None:
        """Copy rows of pages that no slot can be had for, read through the scratch area."""
        (out, places), tokens, start = to, self.pages.form.tokens, 0
        for rows in self.load(pages):
            mine = ((which >= start) & (which < start + len(rows))).nonzero()[:, 0]
            at = (which[mine] - start) * tokens + offsets[mine]
            out[places[mine]] = rows.view(-1, self.pages.form.width).index_select(0, at)
            start += len(rows)

    def _copy(self, slots: Tensor, offsets: Tensor, here: Tensor | None, out: Tensor) -> None:
        """Copy rows of slots; where not all are `here`, theirs."""
        if here is not None:
            slots, offsets = slots[here], offsets[here]
        if len(slots) == 0:
            return
        width = self.pages.form.width
        rows = out if here is None else torch.empty(len(slots), width, dtype=out.dtype)
        if self.mover is not None:
            self.mover.gather(self.data[None], slots, offsets.contiguous(), rows)
        else:
            torch.index_select(self.data.view(-1, width), 0, slots * self.pages.form.tokens + offsets, out=rows)
        if here is not None:
            out[here] = rows
        counts = slots.bincount(minlength=self.used)
        read = counts.nonzero()[:, 0]
        self._touch(read, counts[read])

    def _touch(self, slots: Tensor, counts: Tensor) -> None:
        if len(slots):
            assert self.uses is not None
            self.policy.touch(self.uses, slots, None, self.now, counts.float() / self.pages.form.tokens)

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
                self._know_all()
                self._place(torch.arange(first, first + n), rows[:n])

    def _place(self, pages: Tensor, rows: Tensor) -> None:
        """Copy pages into slots, unused ones first, then those of victims; only the first pages where not all fit."""
        closed = torch.arange(len(self.page_of)) >= self.used
        slots = self._free_slots(len(pages), closed)
        # In this order: where it is stopped, no page is said to be where it is not.
        self.data[slots] = rows[: len(slots)]
        self._name(pages[: len(slots)], slots)

    def _free_slots(self, n: int, closed: Tensor) -> Tensor:
        """Return up to `n` slots that no page has any more, unused ones first; none of those that are closed."""
        form = self.pages.form
        fresh = max(0, min(n, self.room - self.used))
        while fresh and not self.ledger.has_room(fresh * form.n_bytes):
            fresh -= 1
        n_victims = min(n - fresh, len(closed) - int(closed.sum()))
        self.ledger.charge(fresh * form.n_bytes)
        slots = torch.arange(self.used, self.used + fresh)
        if n_victims > 0:
            assert self.uses is not None
            victims = self.policy.choose(self.uses, self.births, n_victims, closed, None)
            self._unname(victims)
            slots = torch.cat([slots, victims])
        self.used += fresh
        return slots

    def _unname(self, slots: Tensor | slice) -> None:
        """Note that no page is in these slots any more; one that was stopped while it was filled has none."""
        pages = self.page_of[slots]
        self.slot_of[pages[pages >= 0]] = -1

    def _name(self, pages: Tensor, slots: Tensor) -> None:
        """Note which pages slots hold now."""
        if len(slots):
            assert self.uses is not None
            self.page_of[slots] = pages
            self.slot_of[pages] = slots.int()
            self.births[slots] = self.now
            self.policy.renew(self.uses, slots, self.now)

    def resident(self, pages: Int[Tensor, "*at"]) -> Bool[Tensor, "*at"]:
        """Return which pages have a copy."""
        with self.lock:
            return self.find(pages) >= 0

    def clear(self) -> None:
        """Free every copy."""
        with self.lock:
            self.ledger.release(self.n_bytes)
            self.used = 0
            self._forget()
            if self.room:
                self._map(self.room)
