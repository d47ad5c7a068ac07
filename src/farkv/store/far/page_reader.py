"""Reads pages of a file in parallel and verifies the checksum of each.

In: an open file, the checksums of its pages, page numbers. Out: the pages' bytes in the order requested, or a
StoreError; never other bytes. Knows bytes, not what the pages mean.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch

from farkv._axes import Int, Tensor
from farkv.errors import StoreError
from farkv.store.memory import Mover, PageMover

# Threads that read and verify one file: enough to keep both the disk and the checksums busy.
READERS = 8
# Most bytes of one read: long runs are split among the readers and verified while still in the CPU's cache.
PIECE_BYTES = 1 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, of any dtype, in place."""
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


class Piece(NamedTuple):
    """One read: `n` pages from page `first`, into page places `at` and following of the output."""

    at: int
    first: int
    n: int


class PageReader:
    """Reads pages of a file in parallel and verifies each of them. The caller keeps `fd` open.

    Args:
        base: where page 0 begins in the file, in bytes.
        checksums: CRC-32 of every page; it may grow.
        name: used in error messages.
    """

    def __init__(self, fd: int, base: int, page_bytes: int, checksums: Sequence[int], name: str):
        self.fd, self.base, self.page_bytes, self.checksums, self.name = fd, base, page_bytes, checksums, name
        # Kernels that read pages; None: plain system calls.
        self.mover: Mover | None = None
        self._pool, self._owner = _make_pool(), os.getpid()

    def __deepcopy__(self, memo: dict[int, Any]) -> PageReader:
        return self  # read-only, so copies share it

    def read(self, ids: Int[Tensor, " N"], out: Tensor, at: Int[Tensor, " N"] | None = None) -> None:
        """Read page `ids[j]` into place at[j] of `out`, or j; these places' content is undefined after an error.

        Args:
            ids: int64, in host memory, in any order, repeats allowed.
            out: contiguous, in host memory, of whole pages.
            at: int64, distinct places of pages in `out`.

        Raises:
            StoreError: a page does not exist, cannot be read, or is not what was written.

        Cost: N pages read, one system call per run of consecutive ids (per `PIECE_BYTES` of a longer one), and
        one pass over them for the checksums.
        """
        place = bytes_of(out)
        if len(ids) == 0:
            return
        at = torch.arange(len(ids)) if at is None else at
        assert len(place) % self.page_bytes == 0
        assert len(at) == len(ids) and int(at.min()) >= 0 and int(at.max()) < len(place) // self.page_bytes
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= len(self.checksums):
            raise StoreError(
                f"{self.name}: expected pages of the {len(self.checksums)} that were written, "
                f"got pages {low} to {high}; ask only for what was written"
            )
        if isinstance(self.mover, PageMover):
            self._read_fast(ids.contiguous(), at.contiguous(), out)
            return
        pieces = self._cut(ids, at)
        if len(pieces) == 1:
            self._read_all(pieces, place)
            return
        if self._owner != os.getpid():
            # A forked child has none of its parent's threads.
            self._pool, self._owner = _make_pool(), os.getpid()
        parts = [pieces[k::READERS] for k in range(min(READERS, len(pieces)))]
        work = [self._pool.submit(self._read_all, part, place) for part in parts]
        # Wait for all, even if one failed: nothing may write to `out` once this returns, or is stopped.
        try:
            wait(work)
        except BaseException:
            wait([part for part in work if not part.cancel()])
            raise
        for done in work:
            done.result()

    def _read_fast(self, ids: Tensor, at: Tensor, out: Tensor) -> None:
        """Read pages by the kernels; where one is refused all are read again here, which says why."""
        assert isinstance(self.mover, PageMover)
        file, sums = (self.fd, self.base, self.page_bytes), [self.checksums[i] for i in ids.tolist()]
        if self.mover.read_pages(file, sums, ids, at, out) < len(ids):
            self._read_all(self._cut(ids, at), bytes_of(out))

    def _cut(self, ids: Tensor, at: Tensor) -> list[Piece]:
        """Cut ids into runs of consecutive pages for consecutive places, and long runs into pieces."""
        pages, places = (np.frombuffer(bytes_of(x.long().contiguous()), np.int64) for x in (ids, at))
        cuts = np.flatnonzero((np.diff(pages) != 1) | (np.diff(places) != 1)) + 1
        most = max(1, PIECE_BYTES // self.page_bytes)
        return [
            Piece(int(places[i]), int(pages[i]), min(most, end - i))
            for start, end in itertools.pairwise([0, *map(int, cuts), len(pages)])
            for i in range(start, end, most)
        ]

    def _read_all(self, pieces: list[Piece], place: memoryview) -> None:
        for piece in pieces:
            part = place[piece.at * self.page_bytes : (piece.at + piece.n) * self.page_bytes]
            self._fill(part, piece.first)
            self._verify(part, piece)

    def _fill(self, part: memoryview, first: int) -> None:
        begin, done = self.base + first * self.page_bytes, 0
        while done < len(part):
            try:
                n = os.preadv(self.fd, [part[done:]], begin + done)
            except OSError as error:
                raise StoreError(
                    f"{self.name}: page {first + done // self.page_bytes} cannot be read at byte {begin + done:,}: "
                    f"expected {len(part) - done:,} bytes, got the error {error.strerror!r}; check the disk"
                ) from error
            if n == 0:
                raise StoreError(
                    f"{self.name}: page {first + done // self.page_bytes} is cut off: expected {len(part):,} bytes "
                    f"from byte {begin:,} on, got {done:,}; something else changed the file, write it again"
                )
            done += n

    def _verify(self, part: memoryview, piece: Piece) -> None:
        for j in range(piece.n):
            expected = self.checksums[piece.first + j]
            got = zlib.crc32(part[j * self.page_bytes : (j + 1) * self.page_bytes])
            if got != expected:
                raise StoreError(
                    f"{self.name}: page {piece.first + j} is damaged: expected checksum {expected:08x}, "
                    f"got {got:08x}; check the disk, and write the file again"
                )


def _make_pool() -> ThreadPoolExecutor:
    """Return a pool whose threads start on demand and end when it is garbage-collected."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="farkv-disk")
