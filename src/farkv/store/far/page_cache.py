"""Copies of disk pages in host memory: as many as the host limit has room for, shared by all layers of one cache.

In: page numbers and places in them. Out: rows, from a copy that is there or read from disk on the way. A copy that
goes is no loss: every page is on disk. Knows pages, not tokens or layers.
"""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.errors import CapacityError
from farkv.store.far.eviction import Policy, Uses
from farkv.store.far.pages import NumberedPages
from farkv.store.ledger import Ledger

# Pages that are read from disk at once, through memory of their own.
SCRATCH_PAGES = 64
# It would work with one, reading the same pages again and again.
LEAST_PAGES, LEAST_SCRATCH = 8, 4


class PageCache:
    """Page copies in one mapping of memory; `room` of them may be used, the others take none."""

    def __init__(self, ledger: Ledger, policy: Policy, pages: NumberedPages):
        self.ledger, self.policy, self.pages = ledger, policy, pages
        # Fetches run on the link's thread, appends on the model's.
        self.lock = threading.RLock()
        self.room = self.used = self.now = 0
        # Pages that are read at once.
        self.piece = SCRATCH_PAGES
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> PageCache:
        # Copies of pages need no copies: the twin reads its own from disk, and counts them itself.
        with self.lock:
            twin = PageCache(copy.deepcopy(self.ledger, memo), self.policy, copy.deepcopy(self.pages, memo))
            twin.ledger.release(self.n_bytes)
            twin.resize(self.room, self.piece)
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
        self.uses: Uses | None = None

    def resize(self, room: int, piece: int = SCRATCH_PAGES) -> None:
        """Let `room` frames be used, and `piece` pages be read at once; memory beyond is given back at once."""
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
            if self.ledger.limit is not None:
                self._drop(-((self.ledger.limit - self.ledger.used - n_bytes) // self.pages.form.n_bytes))

    def _drop(self, n: int) -> None:
        """Give back the last `n` frames that are used, or all."""
        if n <= 0 or self.used == 0:
            return
        n_bytes, left = self.pages.form.n_bytes, max(0, self.used - n)
        self.frame_of[self.page_of[left : self.used]] = -1
        self.page_of[left:] = -1
        first = -(-left * n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.memory is not None and first < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, first)
        self.ledger.release((self.used - left) * n_bytes)
        self.used = left

    def _map(self, n: int) -> None:
        """Map memory for `n` frames; what is not touched takes none."""
        form = self.pages.form
        try:
            if self.memory is None:
                # Private: of shared memory the system would keep what is given back.
                self.memory = mmap.mmap(-1, n * form.n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                # The system moves the mapping where it must, so that there never is a second copy.
                self.memory.resize(n * form.n_bytes)
        except (OSError, OverflowError) as error:
            raise CapacityError(
                f"host: the system refuses {n * form.n_bytes:,} bytes of memory ({error}); give a lower host limit"
            ) from error
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
        form = self.pages.form
        wanted, which = pages.unique(return_inverse=True)
        start = 0
        for rows in self.load(wanted):
            mine = ((which >= start) & (which < start + len(rows))).nonzero()[:, 0]
            at = which[mine] - start
            out[places[mine]] = rows.view(-1, form.width).index_select(0, at * form.tokens + offsets[mine])
            frames = self._place(wanted[start : start + len(rows)], rows)
            self._touch(frames, at.bincount(minlength=len(rows))[: len(frames)])
            start += len(rows)

    def _copy(self, frames: Tensor, offsets: Tensor, places: Tensor, out: Tensor) -> None:
        if len(frames) == 0:
            return
        form = self.pages.form
        out[places] = self.data.view(-1, form.width).index_select(0, frames * form.tokens + offsets)
        self._touch(*frames.unique(return_counts=True))

    def _touch(self, frames: Tensor, counts: Tensor) -> None:
        if len(frames):
            assert self.uses is not None
            self.policy.touch(self.uses, frames, None, self.now, counts.float() / self.pages.form.tokens)

    def load(self, pages: Int[Tensor, " N"]) -> Iterator[Tensor]:
        """Read pages from disk, and give their rows piece by piece; they are valid until the next one is asked for.

        Raises:
            CapacityError: there is no room for the pages that are read at once, even without copies.
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
        """Keep copies of pages that were just written, numbered from `first`, while there are frames to spare."""
        with self.lock:
            n = min(len(rows), self.room - self.used)
            if n > 0:
                numbers = torch.arange(first, first + n)
                self.find(numbers)
                self._place(numbers, rows[:n])

    def _place(self, pages: Tensor, rows: Tensor) -> Tensor:
        """Put page copies into frames: unused ones first, then those of victims; the first ones where not all fit."""
        form = self.pages.form
        fresh = max(0, min(len(pages), self.room - self.used))
        while fresh and not self.ledger.has_room(fresh * form.n_bytes):
            fresh -= 1
        n = min(len(pages), fresh + self.used)
        if n == 0:
            return torch.empty(0, dtype=torch.int64)
        pages, rows = pages[:n], rows[:n]
        assert self.uses is not None
        self.ledger.charge(fresh * form.n_bytes)
        frames = torch.arange(self.used, self.used + fresh)
        self.used += fresh
        if fresh < n:
            closed = torch.arange(len(self.page_of)) >= self.used
            closed[frames] = True
            victims = self.policy.choose(self.uses, self.births, n - fresh, closed, None)
            self.frame_of[self.page_of[victims]] = -1
            frames = torch.cat([frames, victims])
        self.data[frames] = rows
        self.frame_of[pages] = frames.int()
        self.page_of[frames] = pages
        self.births[frames] = self.now
        self.policy.renew(self.uses, frames, self.now)
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
