"""What a name leads to, and whether that is ours: looked at before anything is read from it or written to it.

In: a path, or what the system says of an open file. Out: why it is refused, in words.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

# A pipe is not waited for, a terminal not taken over.
OPEN = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


class RefusedError(OSError):
    """A name is none, or leads to something that is not ours to read or to write."""

    def __init__(self, why: str):
        super().__init__(errno.EINVAL, why)


def check_path(path: str | Path) -> None:
    """Raise RefusedError where no file can have this name."""
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise RefusedError("no file has such a name: half a letter stands in it") from error
    if b"\0" in raw:
        raise RefusedError("no file has such a name: a NUL stands in it")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where there is none."""
    check_path(folder)
    folder.mkdir(parents=True, exist_ok=True)


def open_name(path: str | Path, flags: int) -> int:
    """Open what a name leads to; a file that is made is this user's alone.

    Raises:
        RefusedError: it leads to something that cannot be opened as a file is, such as a socket.
        OSError: the system refuses.
    """
    check_path(path)
    try:
        return os.open(path, flags | OPEN, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        look = os.lstat if flags & os.O_NOFOLLOW else os.stat
        raise RefusedError(f"is {name_kind(look(path).st_mode)}") from error


def name_kind(mode: int) -> str:
    """Return what something is that is no file."""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def find_fault(info: os.stat_result) -> str:
    """Return why an open file may be another one than its name says: another kind, user, or a second name."""
    if not stat.S_ISREG(info.st_mode):
        return f"is {name_kind(info.st_mode)}"
    if info.st_uid != os.geteuid():
        return f"belongs to user {info.st_uid}, this is user {os.geteuid()}"
    return "" if info.st_nlink <= 1 else f"is one file under {info.st_nlink} names"


def find_writers(info: os.stat_result) -> str:
    """Return why others may have written a file."""
    return f"can be written by others (mode {info.st_mode & 0o777:03o})" if info.st_mode & 0o022 else ""


def check_ours(path: str | Path) -> None:
    """Raise RefusedError unless a name leads to a file that this user alone can have written, under this name alone."""
    check_path(path)
    info = os.lstat(path)
    if why := find_fault(info) or find_writers(info):
        raise RefusedError(why)


def find_target(folder: int, name: str) -> os.stat_result | None:
    """Return what is to be replaced in an open folder; None: nothing is there.

    Raises:
        RefusedError: it is a link or no file.
        IsADirectoryError: it is a folder.
    """
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISLNK(info.st_mode):
        raise RefusedError("is a link, which is not followed; give the name that it leads to")
    if not stat.S_ISREG(info.st_mode):
        raise RefusedError(f"is {name_kind(info.st_mode)}, expected a file or a new name")
    return info


def check_target(path: Path) -> None:
    """Raise as a writer of this name would, before the work. Raises as `find_target`."""
    check_path(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        find_target(folder, path.name or ".")
    finally:
        os.close(folder)


def give_mode(fd: int, old: os.stat_result, *, private: bool) -> None:
    """Give a new file the permissions of the one that it replaces, never wider ones."""
    new, mode = os.fstat(fd), stat.S_IMODE(old.st_mode) & 0o777
    if private and old.st_uid != new.st_uid:
        # Whoever made the old one chose its mode, to read what replaces it perhaps.
        mode = 0o600
    elif mode & 0o070 and old.st_gid != new.st_gid:
        try:
            os.fchown(fd, -1, old.st_gid)
        except OSError:
            # Of another group no one was to read it.
            mode &= ~0o070
    if mode != stat.S_IMODE(new.st_mode):
        os.fchmod(fd, mode)


def is_at(fd: int, name: str | Path, folder: int | None = None) -> bool:
    """Return whether an open file is still there by a name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    return False
