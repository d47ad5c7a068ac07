"""A saved session as a file: a header, pages, small tensors; any tool that reads safetensors can look into it.

In: notes, small tensors and a stream of pages, or the path of a file that nobody vouches for. Out: the file, whole or
not at all; its parts, each verified before it is used. Knows bytes, pages and checksums, nothing of models. See
docs/session-format.md.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from farkv._axes import Tensor
from farkv.config import format_bytes
from farkv.errors import FarKVError, SessionError, StoreError
from farkv.session.header import PAGE_CRC, PAGES, Form, Header, check_length, hash_bytes, make_header, parse_header
from farkv.store.far.page_reader import PageReader, bytes_of

# One system call moves less than 2 GiB.
_STEP_BYTES = 2**30


def write_saved(
    path: Path,
    notes: dict[str, Any],
    tensors: dict[str, Tensor],
    pages: Iterable[Tensor],
    n_pages: int,
    page_bytes: int,
) -> None:
    """Write a session; a reader sees what was there before, or the whole new file, whenever this process dies.

    Args:
        notes: JSON values.
        tensors: small tensors in host memory.
        pages: contiguous tensors in host memory, a whole number of pages each, `n_pages` in all; taken one by one.

    Raises:
        SessionError: something cannot be written in this format, or the pages are not as many as were promised.
        StoreError: the disk is full or cannot be written, or another process writes this file now.

    Cost: every byte written and hashed once; memory for one tensor of `pages`.
    """
    forms = _list_forms(path, tensors, n_pages, page_bytes)
    views = {name: bytes_of(tensor.contiguous()) for name, tensor in tensors.items()}
    checks = {name: hash_bytes(view) for name, view in views.items()}
    try:
        header = make_header(notes, forms, checks | {PAGE_CRC: "0" * 32})
        n_bytes = len(header) + sum(form.n_bytes for form in forms.values())
        # What a reader would refuse is not written.
        parse_header(header, n_bytes)
    except SessionError as error:
        raise SessionError(f"session {path}: {error}") from error
    with _hold_part(path, n_bytes) as fd:
        with _say(path, n_bytes):
            # What cannot fit is refused before the work starts.
            os.posix_fallocate(fd, 0, n_bytes)
            os.lseek(fd, len(header), os.SEEK_SET)
        sums = _write_pages(fd, path, pages, forms[PAGES], n_bytes)
        with _say(path, n_bytes):
            for view in (*views.values(), sums):
                _write(fd, view)
            # The header comes last: until it is there, this is no session.
            os.lseek(fd, 0, os.SEEK_SET)
            _write(fd, memoryview(make_header(notes, forms, checks | {PAGE_CRC: hash_bytes(sums)})))
            os.fsync(fd)
            _part_of(path).replace(path)
    with _say(path, n_bytes):
        _sync_folder(path.parent)


def _list_forms(path: Path, tensors: dict[str, Tensor], n_pages: int, page_bytes: int) -> dict[str, Form]:
    """Return the form of everything in a session, in the order of the file."""
    if not {PAGES, PAGE_CRC}.isdisjoint(tensors) or n_pages < 0 or page_bytes < 1:
        raise SessionError(
            f"session {path}: expected names other than {PAGES} and {PAGE_CRC}, and pages of at least a byte, "
            f"got {', '.join(tensors)}, {n_pages} pages of {page_bytes} bytes; correct them"
        )
    small = {name: Form(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return {PAGES: Form(torch.uint8, (n_pages, page_bytes))} | small | {PAGE_CRC: Form(torch.uint32, (n_pages,))}


def _write_pages(fd: int, path: Path, pages: Iterable[Tensor], form: Form, n_bytes: int) -> memoryview:
    """Write pages as they come and return their checksums."""
    n_pages, page_bytes = form.shape
    sums = array.array("I")
    for chunk in pages:
        view = bytes_of(chunk)
        n, rest = divmod(len(view), page_bytes)
        if rest or len(sums) + n > n_pages:
            raise SessionError(
                f"session {path}: expected {n_pages} pages of {page_bytes} bytes, got {len(view)} bytes after "
                f"{len(sums)} pages; it was not written, give what was promised"
            )
        sums.extend(zlib.crc32(view[i * page_bytes : (i + 1) * page_bytes]) for i in range(n))
        with _say(path, n_bytes):
            _write(fd, view)
    if len(sums) != n_pages:
        raise SessionError(
            f"session {path}: expected {n_pages} pages, got {len(sums)}; it was not written, give what was promised"
        )
    return memoryview(sums.tobytes())


def _write(fd: int, view: memoryview) -> None:
    at = 0
    while at < len(view):
        at += os.write(fd, view[at : at + _STEP_BYTES])


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def _hold_part(path: Path, n_bytes: int) -> Iterator[int]:
    """Give the one temporary file of this target, empty and locked, and remove it unless it became the target.

    The lock goes with the process that holds it, so what a killed one left is simply taken over.
    """
    with _say(path, n_bytes):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part = _part_of(path)
        fd = _lock(part, path)
    try:
        with _say(path, n_bytes):
            os.ftruncate(fd, 0)
            # For whoever finds the lock taken; the header will stand there.
            os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
        yield fd
    except BaseException:
        with suppress(OSError):
            if _is_at(fd, part):
                part.unlink()
        raise
    finally:
        os.close(fd)


def _lock(part: Path, path: Path) -> int:
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock its owner may have moved or removed it: then this is not the temporary file.
            if _is_at(fd, part):
                return fd
        except BlockingIOError as error:
            pid = os.pread(fd, 20, 0).strip(b"\0")
            who = f"process {int(pid)}" if pid.isdigit() else "another process"
            os.close(fd)
            raise StoreError(f"session {path}: is being written by {who}; wait for it, or save elsewhere") from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


@contextmanager
def _say(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn what the system says while writing into our words."""
    try:
        yield
    except FarKVError:
        raise
    except OSError as error:
        raise StoreError(
            f"session {path}: cannot be written ({error.strerror or error}); expected a folder with room for "
            f"{n_bytes:,} bytes ({format_bytes(n_bytes)}); free some, or save elsewhere"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a renaming in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Saved:
    """An open session file; its header is verified, everything else when it is read."""

    def __init__(self, path: Path, fd: int, header: Header):
        self.path, self.notes, self._fd, self._header = path, header.notes, fd, header
        self.n_pages, self.page_bytes = header.forms[PAGES].shape
        self.names = [name for name in header.forms if name not in (PAGES, PAGE_CRC)]
        sums = array.array("I", bytes_of(_read_tensor(fd, header, PAGE_CRC)).tobytes())
        self.reader = PageReader(fd, header.starts[PAGES], self.page_bytes, sums, f"session {path}")
        # Caches hold the reader, not this: the file stays open as long as any of them may read it.
        self._end = weakref.finalize(self.reader, os.close, fd)

    @classmethod
    def open(cls, path: Path) -> Saved:
        """Open a session and verify its header; pages and tensors are not read.

        Raises:
            SessionError: there is no such file, or it is damaged, cut or not a session.
            StoreError: it cannot be read.

        Cost: the header and 4 bytes for each page.
        """
        with _tell(path):
            # A pipe would wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise SessionError("expected a file, got something else")
                n_bytes = check_length(os.pread(fd, 8, 0), info.st_size)
                raw = os.pread(fd, n_bytes, 0)
                if len(raw) != n_bytes:
                    raise SessionError(f"expected a header of {n_bytes:,} bytes, got {len(raw):,}: the file was cut")
                return cls(path, fd, parse_header(raw, info.st_size))
            except BaseException:
                os.close(fd)
                raise

    def tensor(self, name: str) -> Tensor:
        """Read one small tensor and verify it.

        Raises:
            SessionError: it is not there, or damaged.
            StoreError: it cannot be read.
        """
        with _tell(self.path):
            if not self._end.alive or name not in self.names:
                have = ", ".join(self.names) if self._end.alive else "a closed file"
                raise SessionError(f"expected tensor {name}, got {have}")
            return _read_tensor(self._fd, self._header, name)

    def close(self) -> None:
        """Close the file, for all who read it."""
        self._end()


def _read_tensor(fd: int, header: Header, name: str) -> Tensor:
    form, start = header.forms[name], header.starts[name]
    try:
        out = torch.empty(form.shape, dtype=form.dtype, device="cpu")
    except RuntimeError as error:
        raise SessionError(f"tensor {name}: no memory for its {form.n_bytes:,} bytes") from error
    view, at = bytes_of(out), 0
    while at < len(view):
        n = os.preadv(fd, [view[at : at + _STEP_BYTES]], start + at)
        if n == 0:
            raise SessionError(f"tensor {name}: expected {len(view):,} bytes, got {at:,}: the file was cut")
        at += n
    if hash_bytes(view) != header.checks[name]:
        raise SessionError(f"tensor {name}: expected what was saved, got damaged bytes")
    # Only a forged file has them, and they would count as True here and as False there.
    if form.dtype == torch.bool and bool((out.view(torch.uint8) > 1).any()):
        raise SessionError(f"tensor {name}: expected bools of 0 and 1, got others")
    return out


@contextmanager
def _tell(path: Path) -> Iterator[None]:
    """Put the file's name and the remedy to what is wrong while reading."""
    try:
        yield
    except SessionError as error:
        raise SessionError(f"session {path}: {error}; save the session anew") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SessionError(f"session {path}: expected a saved session, there is none; check the path") from error
    except OSError as error:
        raise StoreError(f"session {path}: cannot be read ({error.strerror or error}); check the disk") from error
