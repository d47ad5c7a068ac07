"""Copies of disk pages in host memory: as many as the host limit has room for, shared by all layers of one cache.

In: page numbers and places in them. Out: rows, from a copy that is there or read from disk on the way. A copy that
goes is no loss: every page is on disk. Knows pages, not tokens or layers.
"""

from __future__ import annotations

import copy
import mmap
import threading
from typing import Any

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.errors import CapacityError
from farkv.store.eviction import Marks, Policy
from farkv.store.ledger import Ledger
from farkv.store.pages import Pages

# Pages that are read from disk at once, through memory of their own.
SCRATCH_PAGES = 64
# It would work with one, reading the same pages again and again.
LEAST_FRAMES, LEAST_SCRATCH = 8, 4


class Frames:
    """Page copies in one mapping of memory; `room` of them may be used, the others take none."""

    def __init__(self, ledger: Ledger, policy: Policy, pages: Pages):
        self.ledger, self.policy, self.pages = ledger, policy, pages
        # Fetches run on the link's thread, appends on the model's.
        self.lock = threading.RLock()
        self.room = self.used = self.now = 0
        # Pages that are read at once.
        self.piece = SCRATCH_PAGES
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Frames:
        # Copies of pages need no copies: the twin reads its own from disk, and counts them itself.
        twin = Frames(copy.deepcopy(self.ledger, memo), self.policy, copy.deepcopy(self.pages, memo))
        twin.ledger.release(self.n_bytes)
        twin.resize(self.room)
        return twin

    @property
    def n_bytes(self) -> int:
        """Bytes that are used and counted."""
        scratch = 0 if self.scratch is None else self.scratch.numel() * self.scratch.element_size()
        return self.used * self.pages.form.n_bytes + scratch

    def _forget(self) -> None:
        self.data = torch.empty(0)
        self.memory: mmap.mmap | None = None
        self.scratch: Tensor | None = None
        # Of every page the frame it is in, -1 without one; of every frame its page.
        self.frame_of = torch.empty(0, dtype=torch.int32)
        self.page_of = torch.empty(0, dtype=torch.int64)
        self.births = torch.empty(0, dtype=torch.int32)
        self.marks: Marks | None = None

    def resize(self, room: int) -> None:
        """Let `room` frames be used; memory of frames beyond is given back at once."""
        form = self.pages.form
        with self.lock:
            if self.used > room:
                gone = self.page_of[room : self.used]
                self.frame_of[gone] = -1
                self.page_of[room:] = -1
                if self.memory is not None:
                    first = -(-room * form.n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                    self.memory.madvise(mmap.MADV_DONTNEED, first)
                self.ledger.release((self.used - room) * form.n_bytes)
                self.used = room
            self.room = room
            if room > len(self.page_of):
                self._map(room)

    def _map(self, n: int) -> None:
        """Map memory for `n` frames; what is not touched takes none."""
        form = self.pages.form
        try:
            memory = mmap.mmap(-1, n * form.n_bytes)
        except (OSError, OverflowError) as error:
            raise CapacityError(
                f"host: the system refuses {n * form.n_bytes:,} bytes of memory ({error}); give a lower host limit"
            ) from error
        data = torch.frombuffer(memory, dtype=form.dtype).view(n, form.tokens, form.width)
        data[: self.used] = self.data[: self.used] if self.used else 0
        page_of = torch.full((n,), -1, dtype=torch.int64)
        births = torch.zeros(n, dtype=torch.int32)
        page_of[: self.used], births[: self.used] = self.page_of[: self.used], self.births[: self.used]
        marks = self.policy.start((n,), self.now, torch.device("cpu"))
        self.data, self.memory, self.page_of, self.births = data, memory, page_of, births
        if self.marks is not None:
            marks.values[: self.used] = self.marks.values[: self.used]
            marks.hand.copy_(self.marks.hand)
        self.marks = marks

    def find(self, pages: Int[Tensor, "*at"]) -> Int[Tensor, "*at"]:
        """Return the frames that pages are in, -1 for those that are only on disk."""
        if pages.numel() and int(pages.max()) >= len(self.frame_of):
            grown = torch.full((int(pages.max()) * 5 // 4 + 64,), -1, dtype=torch.int32)
            grown[: len(self.frame_of)] = self.frame_of
            self.frame_of = grown
        return self.frame_of[pages]

    def take(self, pages: Int[Tensor, " N"], offsets: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy row `offsets[j]` of page `pages[j]` into `out[j]`, reading from disk what has no copy here.

        Cost: N rows read and written, and the bytes of every page that had to be read.

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        with self.lock:
            self.now += 1
            frames = self.find(pages).long()
            here = (frames >= 0).nonzero()[:, 0]
            self._copy(frames[here], offsets[here], here, out)
            missing = (frames < 0).nonzero()[:, 0]
            if len(missing):
                self._take_missing(pages[missing], offsets[missing], missing, out)

    def _take_missing(self, pages: Tensor, offsets: Tensor, places: Tensor, out: Tensor) -> None:
        wanted, which = pages.unique(return_inverse=True)
        piece = min(self.piece if self.scratch is None else len(self.scratch), self.room)
        for start in range(0, len(wanted), piece):
            frames = self.load(wanted[start : start + piece])
            mine = ((which >= start) & (which < start + piece)).nonzero()[:, 0]
            self._copy(frames[which[mine] - start], offsets[mine], places[mine], out)

    def _copy(self, frames: Tensor, offsets: Tensor, places: Tensor, out: Tensor) -> None:
        if len(frames) == 0:
            return
        form = self.pages.form
        rows = self.data.view(-1, form.width).index_select(0, frames * form.tokens + offsets)
        out[places] = rows
        assert self.marks is not None
        used, counts = frames.unique(return_counts=True)
        self.policy.touch(self.marks, used, None, self.now, counts.float() / form.tokens)

    def load(self, pages: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Read pages that have no copy here into frames, at most `piece` at once; return the frames.

        Raises:
            StoreError: a page is damaged or cannot be read; no frame has changed.
        """
        n, form = len(pages), self.pages.form
        if self.scratch is None:
            self.ledger.charge(self.piece * form.n_bytes)
            self.scratch = torch.empty(self.piece, form.tokens, form.width, dtype=form.dtype)
        self.pages.read(pages, self.scratch[:n])
        return self._place(pages, self.scratch[:n])

    def offer(self, first: int, rows: Tensor) -> None:
        """Keep copies of pages that were just written, numbered from `first`, while there are frames to spare."""
        with self.lock:
            n = min(len(rows), self.room - self.used)
            if n > 0:
                numbers = torch.arange(first, first + n)
                self.find(numbers)
                self._place(numbers, rows[:n])

    def _place(self, pages: Tensor, rows: Tensor) -> Tensor:
        """Put page copies into frames: unused ones first, then those of victims."""
        n, form = len(pages), self.pages.form
        assert self.marks is not None
        fresh = min(n, self.room - self.used)
        while fresh and not self.ledger.has_room(fresh * form.n_bytes):
            fresh -= 1
        self.ledger.charge(fresh * form.n_bytes)
        frames = torch.arange(self.used, self.used + fresh)
        self.used += fresh
        if fresh < n:
            closed = torch.arange(len(self.page_of)) >= self.used
            closed[frames] = True
            victims = self.policy.choose(self.marks, self.births, n - fresh, closed, None)
            self.frame_of[self.page_of[victims]] = -1
            frames = torch.cat([frames, victims])
        self.data[frames] = rows
        self.frame_of[pages] = frames.int()
        self.page_of[frames] = pages
        self.births[frames] = self.now
        self.policy.renew(self.marks, frames, self.now)
        return frames

    def resident(self, pages: Int[Tensor, "*at"]) -> Bool[Tensor, "*at"]:
        """Say which pages have a copy here."""
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
