"""The one way in which farkv reads, replaces, appends to and locks a file by its name.

In: a path that somebody else may have put something at. Out: a file that others see only once it is complete and on
the disk; one that is locked; or an error. What a name leads to is looked at after it was opened and before it is
used: a link, a pipe, a device or another user's file is refused, and stays as it was.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from farkv.errors import FarKVError, StoreError
from farkv.names import (
    OPEN,
    RefusedError,
    check_path,
    find_fault,
    find_target,
    find_writers,
    give_mode,
    is_at,
    name_kind,
    open_name,
)
from farkv.quote import quote

# One system call moves less than 2 GiB.
_STEP_BYTES = 2**30
_PART = os.O_RDWR | os.O_NOFOLLOW | OPEN
# Writers that began at the same moment let go and try again so many times.
_TRIES = 8


class InUseError(BlockingIOError):
    """A file is locked: by another process, or elsewhere in this one."""

    def __init__(self, who: str):
        super().__init__(errno.EAGAIN, f"in use by {who}")
        self.who = who


class _Part(NamedTuple):
    """An open, locked file that will become another."""

    name: str
    fd: int


def read_file(path: str | Path) -> bytes:
    """Return all of a file; a link to one is followed.

    Raises:
        RefusedError: the name leads to a pipe, a device or a folder.
        OSError: it cannot be read.
    """
    with open(open_file(path), "rb") as file:
        return file.read()


def open_file(path: str | Path) -> int:
    """Open a file for reading; a link to one is followed. Raises as `read_file`."""
    fd = open_name(path, os.O_RDONLY)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise RefusedError(f"is {name_kind(mode)}, expected a file")
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def pass_file(path: str | Path) -> Iterator[str]:
    """Give another name of a file that is open for reading, for libraries that want names. Raises as `read_file`."""
    with open(open_file(path), "rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def write_file(path: str | Path, data: bytes, what: str, *, private: bool = False) -> None:
    """Write a file; a reader finds what was there before or all of `data`.

    Args:
        what: it is, for the message.
        private: it holds a user's text: no one else can read it, unless the file that it replaces could be read.

    Raises:
        StoreError: it cannot be written; what was there before still is.
    """
    with saying(what, path), replace_file(Path(path), len(data), private=private) as fd:
        write_all(fd, memoryview(data))


@contextmanager
def saying(what: str, path: str | Path, size: str = "it") -> Iterator[None]:
    """Put what the system says while a file is written into our words: StoreError."""
    try:
        yield
    except FarKVError:
        raise
    except InUseError as error:
        raise StoreError(f"{what} {quote(path)}: is being written by {error.who}; wait, or use another name") from error
    except OSError as error:
        raise StoreError(
            f"{what} {quote(path)}: cannot be written ({error.strerror}), what was there stays; expected a name "
            f"in a folder that can be written, with room for {size}; choose another one"
        ) from error


@contextmanager
def replace_file(path: Path, n_bytes: int, *, private: bool = False) -> Iterator[int]:
    """Give a file of `n_bytes`, all to be written, that takes the place of `path` when the block ends without an error.

    Whenever this process dies, a reader finds what was there before or the whole new file. What a killed one left
    (`.NAME.….part`) is removed by the next writer of the same name. Permissions are those of the file that is replaced,
    never wider; of a new one what the system's mask leaves, or none for others where it is `private`.

    Raises:
        InUseError: the file is being written already.
        RefusedError: at `path` is a link, a pipe, a device or a socket.
        OSError: there is no room, or the system refuses; what was there before still is.
    """
    check_path(path)
    name = path.name or "."
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        old = find_target(folder, name)
        part = _make_part(folder, name, 0o600 if private or old else 0o666)
        try:
            os.ftruncate(part.fd, n_bytes)
            if n_bytes:
                # What cannot fit is refused before the work starts.
                os.posix_fallocate(part.fd, 0, n_bytes)
            yield part.fd
            if old is not None:
                give_mode(part.fd, old, private=private)
            os.fsync(part.fd)
            # What came to the target's place meanwhile is looked at as well.
            find_target(folder, name)
            os.rename(part.name, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _drop(folder, part)
            raise
        finally:
            os.close(part.fd)
        # A renaming survives a loss of power only then.
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Append a line of a user's text to a file, which is made where there is none; all of it or nothing.

    Raises:
        RefusedError: the name leads to a link, to no file or to another user's.
        OSError: there is no room, or the system refuses.
    """
    fd = open_name(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    try:
        info = os.fstat(fd)
        if why := find_fault(info):
            raise RefusedError(why)
        try:
            # Half a letter becomes an escape, which JSON reads back as that.
            write_all(fd, memoryview((line + "\n").encode("utf-8", "backslashreplace")))
        except BaseException:
            os.ftruncate(fd, info.st_size)
            raise
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write bytes, in as many calls as it takes."""
    at = 0
    while at < len(data):
        at += os.write(fd, data[at : at + _STEP_BYTES])


def open_unnamed(folder: Path) -> int:
    """Open a new file without a name: closing it, or dying, is its end."""
    check_path(folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def lock_file(path: Path) -> int:
    """Lock a file, which then holds nothing but this process's number; closing it, or dying, lets go of it.

    Raises:
        InUseError: it is locked.
        RefusedError: it is not a lock of ours; it stays as it is.
        OSError: it cannot be made or opened.
    """
    while True:
        fd = open_name(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            if _take_lock(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _take_lock(fd: int, path: Path) -> bool:
    """Lock an open file if it is a lock of ours, and return whether it is still there by its name."""
    info = os.fstat(fd)
    held = b"" if find_fault(info) else os.pread(fd, 21, 0).strip(b"\0")
    # Others can move a file of ours here: what holds anything but a number is not overwritten.
    other = "holds something else" if held and not (held.isdigit() and len(held) <= 20) else ""
    if why := find_fault(info) or find_writers(info) or other:
        raise RefusedError(why)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(f"process {int(held)}" if held else "another process") from error
    # Between open and lock it may have been moved or removed: then it is another file.
    if not is_at(fd, path):
        return False
    # For whoever finds it locked; on a full disk there is no room even for that.
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
    return True


def _make_part(folder: int, name: str, mode: int) -> _Part:
    """Make a file beside another, which no one else writes now; it is locked as long as it is open.

    Raises:
        InUseError: somebody else does.
    """
    # A name may fill all that the system has for one; these do not.
    start = f".{name[:30]}.{blake2b(os.fsencode(name), digest_size=4).hexdigest()}."
    for again in range(_TRIES):
        _end_parts(folder, start, "")
        part = f"{start}{os.getpid()}-{secrets.token_hex(8)}.part"
        made = _Part(part, os.open(part, os.O_CREAT | os.O_EXCL | _PART, mode, dir_fd=folder))
        try:
            if why := find_fault(os.fstat(made.fd)):
                raise RefusedError(f"a new file there {why}; choose another folder")
            fcntl.flock(made.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before it was locked another writer may have taken it for a dead one's.
            if is_at(made.fd, part, folder):
                _end_parts(folder, start, part)
                return made
            os.close(made.fd)
        except BaseException as error:
            _drop(folder, made)
            os.close(made.fd)
            if not isinstance(error, BlockingIOError) or again == _TRIES - 1:
                raise
        # Two that began at once see each other, and both let go.
        time.sleep(random.uniform(0.0, 0.002 * 2**again))
    raise InUseError("another process")


def _end_parts(folder: int, start: str, own: str) -> None:
    """Remove what killed writers left in an open folder; raise InUseError where one of them lives."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.startswith(start) and e.name.endswith(".part") and e.name != own]
    for name in names:
        with suppress(FileNotFoundError):
            # Not ours, so no writer's: it is neither waited for nor removed.
            if find_fault(os.stat(name, dir_fd=folder, follow_symlinks=False)):
                continue
            fd = os.open(name, _PART, dir_fd=folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not find_fault(os.fstat(fd)) and is_at(fd, name, folder):
                    os.unlink(name, dir_fd=folder)
            except BlockingIOError as error:
                pid = name.removeprefix(start).split("-")[0]
                raise InUseError(f"process {int(pid)}" if pid.isdecimal() else "another process") from error
            finally:
                os.close(fd)


def _drop(folder: int, part: _Part) -> None:
    with suppress(OSError):
        if is_at(part.fd, part.name, folder):
            os.unlink(part.name, dir_fd=folder)
