"""The disk tier's files: pages of equal size in an unnamed file, under a byte limit, verified when read.

In: pages, as tensors in host memory. Out: the same bytes in the order requested, or a StoreError; never other bytes.
Knows bytes, not what the pages mean.
"""

from __future__ import annotations

import array
import fcntl
import itertools
import os
import threading
import weakref
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from farkv._axes import Int, Tensor
from farkv.errors import StoreError
from farkv.files import InUseError, lock_file, open_unnamed
from farkv.names import RefusedError, make_folder
from farkv.quote import quote
from farkv.store.far.page_reader import PageReader, bytes_of
from farkv.store.ledger import Ledger
from farkv.store.memory import Mover

LOCK_NAME = ".farkv.lock"
# Bytes written between two calls that trim the system's page cache.
TIDY_BYTES = 64 << 20


class PageFile:
    """Append-only file of pages of equal size; written pages never change, so copies of a cache share the file.

    Args:
        fd: an empty file, open for reading and writing; owned by this object from now on.
        ledger: charged for every page until the file is closed or garbage-collected.
        name: used in error messages.
    """

    def __init__(self, fd: int, page_bytes: int, ledger: Ledger, name: str):
        assert page_bytes > 0
        self.page_bytes, self.name = page_bytes, name
        self._ledger, self._fd = ledger, fd
        # 4 bytes a page, in host memory. Its length is the number of pages: the only count of them.
        self._checksums = array.array("I")
        self._end = weakref.finalize(self, _end_file, fd, page_bytes, ledger, self._checksums)
        self._reader = PageReader(fd, 0, page_bytes, self._checksums, name)
        self._writing = threading.Lock()  # copies of a cache may write from different threads
        self._tidied = 0
        # Reads are random: read-ahead would bring unwanted pages.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __deepcopy__(self, memo: dict[int, Any]) -> PageFile:
        return self

    @property
    def n_pages(self) -> int:
        """Pages written."""
        return len(self._checksums)

    def write(self, pages: Tensor) -> int:
        """Append pages and return the number of the first one.

        Args:
            pages: contiguous, in host memory, of any dtype, a whole number of pages large.

        Raises:
            CapacityError: they would exceed the limit; nothing is written.
            StoreError: the system cannot store them; the file is as it was.

        Cost: one pass over the bytes for the checksums, and one copy into the system's cache, written back later.
        """
        data = bytes_of(pages)
        n_new, rest = divmod(len(data), self.page_bytes)
        assert rest == 0
        with self._writing:
            self._check_open()
            first = self.n_pages
            self._ledger.charge(len(data))
            try:
                sums = [zlib.crc32(data[j * self.page_bytes : (j + 1) * self.page_bytes]) for j in range(n_new)]
                self._append(data, first)
            except BaseException:
                # Whatever the cause, Ctrl-C included: cut off the partly written pages.
                self._ledger.release(len(data))
                self._tidied = min(self._tidied, first * self.page_bytes)
                with suppress(OSError):  # the next write overwrites them
                    os.ftruncate(self._fd, first * self.page_bytes)
                raise
            self._checksums.extend(sums)
        return first

    def use(self, mover: Mover | None) -> None:
        """Read by these kernels from now on."""
        self._reader.mover = mover

    def read(self, ids: Int[Tensor, " N"], out: Tensor, at: Int[Tensor, " N"] | None = None) -> None:
        """Read page `ids[j]` into place at[j] of `out`, or j, verified; see `PageReader.read`."""
        self._check_open()
        self._reader.read(ids, out, at)

    def drop_cached(self) -> None:
        """Write everything to disk and drop it from the system's cache: the next reads are cold."""
        self._check_open()
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file and release its bytes."""
        with self._writing:
            self._end()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise StoreError(f"{self.name}: it is closed; expected an open file, open another one")

    def _append(self, data: memoryview, first: int) -> None:
        begin, done = first * self.page_bytes, 0
        while done < len(data):
            try:
                n = os.pwrite(self._fd, data[done : done + TIDY_BYTES], begin + done)
            except OSError as error:
                raise StoreError(
                    f"{self.name}: page {first + done // self.page_bytes} cannot be written at byte {begin + done:,}: "
                    f"expected room for {len(data) - done:,} bytes, got the error {error.strerror!r}; "
                    "make room there, or choose another folder"
                ) from error
            done += n
            self._tidy(begin + done)

    def _tidy(self, end: int) -> None:
        """Keep written pages from filling the system's cache: host memory is scarce here.

        DONTNEED starts write-back of dirty pages and drops clean ones. So each stretch is advised twice: when it was
        just written, which starts write-back, and one stretch later, when that is likely done. It never waits: a sync
        per stretch would leave nothing cached, where this leaves up to two stretches, but cost a third of the speed
        when measured. A failed write-back is found by the checksums. Older stretches that were read stay cached.
        """
        if end - self._tidied < TIDY_BYTES:
            return
        start = max(0, self._tidied - TIDY_BYTES)
        os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)
        self._tidied = end


class DiskSpace:
    """A folder under a byte limit, used by one process at a time; created if missing.

    Raises:
        StoreError: the folder cannot be created, is no folder, is not writable, or is in use.
    """

    def __init__(self, folder: Path, limit: int | None):
        self.folder, self.ledger = folder, Ledger("disk", limit)
        fd = _lock_folder(folder)
        self._end = weakref.finalize(self, _end_space, fd, os.getpid())
        self._numbers = itertools.count()

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskSpace:
        return self  # one folder, one limit

    def __enter__(self) -> DiskSpace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open_file(self, page_bytes: int) -> PageFile:
        """Create an empty unnamed file, which the system removes when the process ends, however it ends.

        Raises:
            StoreError: the space is closed, or the system refuses.
        """
        if not self._end.alive:
            raise StoreError(f"disk store {quote(self.folder)}: it is closed; expected an open one, open it again")
        name = f"disk store {quote(self.folder)}, file {next(self._numbers)}"
        try:
            fd = open_unnamed(self.folder)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return PageFile(fd, page_bytes, self.ledger, name)

    def close(self) -> None:
        """Unlock the folder; open files stay usable."""
        self._end()


def _end_file(fd: int, page_bytes: int, ledger: Ledger, checksums: array.array[int]) -> None:
    os.close(fd)
    ledger.release(len(checksums) * page_bytes)


def _end_space(fd: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not release its parent's lock
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _lock_folder(folder: Path) -> int:
    """Lock a folder for this process; the system releases the lock when the process ends, however it ends."""
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "not writable")
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        # The lock file is no page: its few bytes are not counted, and it stays.
        return lock_file(folder / LOCK_NAME)
    except InUseError as error:
        raise StoreError(
            f"disk store {quote(folder)}: {error.strerror}; expected a folder that no one else uses; "
            "end that use, or choose another folder"
        ) from error
    except RefusedError as error:
        raise StoreError(
            f"disk store {quote(folder)}: {LOCK_NAME} {error.strerror}; expected a lock of farkv's; "
            "remove it, or choose another folder"
        ) from error
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"disk store {quote(folder)}: expected a folder that can be written, got the error {error.strerror!r}; "
        "choose another folder"
    )
