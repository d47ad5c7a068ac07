"""The one way in which farkv replaces a file, and the one way in which it locks one.

In: a path. Out: a file that others see only once it is complete and on the disk, or one that is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# One system call moves less than 2 GiB.
_STEP_BYTES = 2**30


class InUseError(BlockingIOError):
    """A file is locked: by another process, or elsewhere in this one."""

    def __init__(self, who: str):
        super().__init__(errno.EAGAIN, f"in use by {who}")
        self.who = who


@contextmanager
def replace_file(path: Path, n_bytes: int) -> Iterator[int]:
    """Give a file of `n_bytes`, all to be written, that takes the place of `path` when the block ends without an error.

    Whenever this process dies, a reader finds what was there before or the whole new file. What a killed one left
    (`.NAME.part`) is taken over by the next writer.

    Raises:
        InUseError: the file is being written already.
        OSError: there is no room, or the system refuses; what was there before still is.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    part = path.with_name(f".{path.name}.part")
    fd = lock_file(part, 0o644)
    try:
        os.ftruncate(fd, n_bytes)
        if n_bytes:
            # What cannot fit is refused before the work starts.
            os.posix_fallocate(fd, 0, n_bytes)
        yield fd
        os.fsync(fd)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            if _is_at(fd, part):
                part.unlink()
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a file; a reader finds what was there before or all of `data`.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    with replace_file(path, len(data)) as fd:
        write_all(fd, memoryview(data))


def write_all(fd: int, data: memoryview) -> None:
    """Write bytes, in as many calls as it takes."""
    at = 0
    while at < len(data):
        at += os.write(fd, data[at : at + _STEP_BYTES])


def lock_file(path: Path, mode: int) -> int:
    """Lock a file, which then holds nothing but this process's number; closing it, or dying, lets go of it.

    Args:
        mode: of the file where it is made.

    Raises:
        InUseError: it is locked.
        OSError: it is a link, or cannot be opened.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock its owner may have moved or removed it: then it is another file.
            if _is_at(fd, path):
                # For whoever finds it locked; on a full disk there is no room even for that.
                with suppress(OSError):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
                return fd
        except BlockingIOError as error:
            pid = os.pread(fd, 20, 0).strip(b"\0")
            os.close(fd)
            raise InUseError(f"process {int(pid)}" if pid.isdigit() else "another process") from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _sync_folder(folder: Path) -> None:
    """Make a renaming in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
