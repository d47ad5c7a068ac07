"""The ground of the disk store: equal pages in a file without a name, under a byte limit, verified when read.

In: pages, as tensors in host memory. Out: the same bytes in the order asked for, or a StoreError; never other bytes.
Knows bytes, not what the pages mean.
"""

from __future__ import annotations

import array
import fcntl
import itertools
import os
import tempfile
import threading
import weakref
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from farkv._axes import Int, Tensor
from farkv.errors import StoreError
from farkv.files import InUseError, lock_file
from farkv.store.far.page_reader import PageReader, bytes_of
from farkv.store.ledger import Ledger

LOCK_NAME = ".farkv.lock"
# Bytes written between two tidyings of the system's cache.
TIDY_BYTES = 64 << 20


class PageFile:
    """Append-only file of equal pages; a page never changes once it is written, so copies share the file.

    Args:
        fd: an empty file, open for reading and writing, that is this object's from now on.
        ledger: is charged for every page until the file is closed or gone.
        name: what messages call the file.
    """

    def __init__(self, fd: int, page_bytes: int, ledger: Ledger, name: str):
        assert page_bytes > 0
        self.page_bytes, self.name = page_bytes, name
        self._ledger, self._fd = ledger, fd
        # 4 bytes a page, in host memory. Its length is the number of pages: no other count can disagree with it.
        self._checksums = array.array("I")
        self._end = weakref.finalize(self, _end_file, fd, page_bytes, ledger, self._checksums)
        self._reader = PageReader(fd, 0, page_bytes, self._checksums, name)
        self._writing = threading.Lock()  # copies that share the file may write from different threads
        self._tidied = 0
        # Pages are chosen, not followed: reading ahead would bring what nobody asked for.
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
            CapacityError: they would pass the limit; nothing is written.
            StoreError: the system cannot store them; the file is as it was.

        Cost: one pass over the bytes for the checksums and one copy to the system's cache, which writes on its own.
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
                # Whatever stopped it, Ctrl-C too. The torn bytes are no one's: give them back to the system.
                self._ledger.release(len(data))
                self._tidied = min(self._tidied, first * self.page_bytes)
                with suppress(OSError):  # the next write overwrites them
                    os.ftruncate(self._fd, first * self.page_bytes)
                raise
            self._checksums.extend(sums)
        return first

    def read(self, ids: Int[Tensor, " N"], out: Tensor) -> None:
        """Read page `ids[j]` into place j of `out`, verified; see `PageReader.read`."""
        self._check_open()
        self._reader.read(ids, out)

    def drop_cached(self) -> None:
        """Write everything to the disk and make the system forget its copies: the next reads are cold."""
        self._check_open()
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the file and its bytes back."""
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
        """Keep what was written from piling up in the system's cache, where host memory is what is short.

        The advice starts writing what is dirty and drops what is clean. So each stretch is named twice: when it was
        just written, which starts it on its way to the disk, and one stretch later, when it is likely there. Nothing
        is waited for: a sync per stretch leaves nothing cached where this leaves up to two, but took a third of the
        speed in a measurement. A disk that fails after the write is found by the checksums. What was read of older
        stretches stays cached.
        """
        if end - self._tidied < TIDY_BYTES:
            return
        start = max(0, self._tidied - TIDY_BYTES)
        os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)
        self._tidied = end


class DiskSpace:
    """A folder under a byte limit, used by one process at a time; it is made where it is missing.

    Raises:
        StoreError: the folder cannot be made, is no folder, cannot be written, or is in use.
    """

    def __init__(self, folder: Path, limit: int | None):
        self.folder, self.ledger = folder, Ledger("disk", limit)
        fd = _lock_folder(folder)
        self._end = weakref.finalize(self, _end_space, fd, os.getpid())
        self._numbers = itertools.count()

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskSpace:
        return self  # there is one folder, and one limit

    def __enter__(self) -> DiskSpace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open_file(self, page_bytes: int) -> PageFile:
        """Make an empty file that has no name, so that nothing is left of it when the process ends, however it ends.

        Raises:
            StoreError: the space is closed, or the system refuses.
        """
        if not self._end.alive:
            raise StoreError(f"disk store {self.folder}: it is closed; expected an open one, open it again")
        name = f"disk store {self.folder}, file {next(self._numbers)}"
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                fd = os.dup(file.fileno())
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return PageFile(fd, page_bytes, self.ledger, name)

    def close(self) -> None:
        """Let others use the folder; open files stay usable."""
        self._end()


def _end_file(fd: int, page_bytes: int, ledger: Ledger, checksums: array.array[int]) -> None:
    os.close(fd)
    ledger.release(len(checksums) * page_bytes)


def _end_space(fd: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not take its parent's lock away
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _lock_folder(folder: Path) -> int:
    """Lock a folder for this process; the system lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "not writable")
        # The lock file is no page: its few bytes are not counted, and it stays.
        return lock_file(folder / LOCK_NAME, 0o600)
    except InUseError as error:
        raise StoreError(
            f"disk store {folder}: {error.strerror}; expected a folder that no one else uses; "
            "end that use, or choose another folder"
        ) from error
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"disk store {folder}: expected a folder that can be written, got the error {error.strerror!r}; "
        "choose another folder"
    )
