"""A saved session as a file: a header, pages, small tensors; any tool that reads safetensors can look into it.

In: notes, small tensors and a stream of pages, or the path of a file that nobody vouches for. Out: the file, whole or
not at all; its parts, each verified before it is used. Knows bytes, pages and checksums, nothing of models. See
docs/session-format.md.
"""

from __future__ import annotations

import array
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from farkv._axes import Tensor
from farkv.config import format_bytes
from farkv.errors import SessionError, StoreError
from farkv.files import open_file, replace_file, saying, write_all
from farkv.names import RefusedError
from farkv.quote import quote
from farkv.session.header import (
    MAX_HEADER_BYTES,
    PAGE_CRC,
    PAGES,
    Header,
    TensorForm,
    hash_bytes,
    make_header,
    parse_header,
)
from farkv.store.far.page_reader import PageReader, bytes_of


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
    if not {PAGES, PAGE_CRC}.isdisjoint(tensors) or n_pages < 0 or page_bytes < 1:
        raise SessionError(
            f"session {quote(path)}: expected names other than {PAGES} and {PAGE_CRC}, and pages of at least a byte, "
            f"got {', '.join(tensors)}, {n_pages} pages of {page_bytes} bytes; correct them"
        )
    views = {name: bytes_of(tensor.contiguous()) for name, tensor in tensors.items()}
    checks = {name: hash_bytes(view) for name, view in views.items()} | {PAGE_CRC: "0" * 32}
    forms = {PAGES: TensorForm(torch.uint8, (n_pages, page_bytes))}
    forms |= {name: TensorForm(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    forms[PAGE_CRC] = TensorForm(torch.uint32, (n_pages,))
    try:
        header = make_header(notes, forms, checks)
        n_bytes = len(header) + sum(form.n_bytes for form in forms.values())
        # What a reader would refuse is not written.
        parse_header(header, n_bytes)
    except SessionError as error:
        raise SessionError(f"session {quote(path)}: {error}") from error
    with _give(path, n_bytes, pages) as given, replace_file(path, n_bytes, private=True) as fd:
        os.lseek(fd, len(header), os.SEEK_SET)
        checksums = _write_pages(fd, path, given, forms[PAGES])
        for view in (*views.values(), checksums):
            write_all(fd, view)
        # The header comes last: until it is there, this is no session.
        os.lseek(fd, 0, os.SEEK_SET)
        write_all(fd, memoryview(make_header(notes, forms, checks | {PAGE_CRC: hash_bytes(checksums)})))


def _write_pages(fd: int, path: Path, pages: Iterable[Tensor], form: TensorForm) -> memoryview:
    """Write pages as they come and return their checksums."""
    n_pages, page_bytes = form.shape
    sums, wrong = array.array("I"), ""
    for chunk in pages:
        view = bytes_of(chunk)
        n, rest = divmod(len(view), page_bytes)
        if rest or len(sums) + n > n_pages:
            wrong = f" of {page_bytes} bytes, got {len(view)} bytes after {len(sums)} pages"
            break
        sums.extend(zlib.crc32(view[i * page_bytes : (i + 1) * page_bytes]) for i in range(n))
        write_all(fd, view)
    if wrong or len(sums) != n_pages:
        wrong = wrong or f", got {len(sums)}"
        raise SessionError(
            f"session {quote(path)}: expected {n_pages} pages{wrong}; it was not written, give what was promised"
        )
    return memoryview(sums.tobytes())


@contextmanager
def _give(path: Path, n_bytes: int, pages: Iterable[Tensor]) -> Iterator[Iterator[Tensor]]:
    """Give the pages; put what the system says while they are written, not while they are made, into our words."""
    theirs: list[OSError] = []

    def give() -> Iterator[Tensor]:
        try:
            yield from pages
        except OSError as error:
            theirs.append(error)
            raise

    try:
        yield give()
    except OSError as error:
        if error in theirs:
            raise
        with saying("session", path, f"{n_bytes:,} bytes ({format_bytes(n_bytes)})"):
            raise


class Saved:
    """An open session file; its header is verified, everything else when it is read."""

    def __init__(self, path: Path, fd: int, header: Header):
        self.path, self.notes, self._fd, self._header = path, header.notes, fd, header
        self.n_pages, self.page_bytes = header.forms[PAGES].shape
        self.names = [name for name in header.forms if name not in (PAGES, PAGE_CRC)]
        sums = array.array("I", bytes_of(_read_tensor(fd, header, PAGE_CRC)).tobytes())
        self.reader = PageReader(fd, header.starts[PAGES], self.page_bytes, sums, f"session {quote(path)}")
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
            fd = open_file(path)
            try:
                return cls(path, fd, parse_header(os.pread(fd, 8 + MAX_HEADER_BYTES, 0), os.fstat(fd).st_size))
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

    def tensors(self, start: str) -> dict[str, Tensor]:
        """Read the small tensors whose names begin with `start`, and leave that out of their names."""
        return {name.removeprefix(start): self.tensor(name) for name in self.names if name.startswith(start)}

    def close(self) -> None:
        """Close the file, for all who read it."""
        self._end()


def _read_tensor(fd: int, header: Header, name: str) -> Tensor:
    form = header.forms[name]
    try:
        out = torch.empty(form.shape, dtype=form.dtype, device="cpu")
    except RuntimeError as error:
        raise SessionError(f"tensor {name}: no memory for its {form.n_bytes:,} bytes") from error
    view = bytes_of(out)
    with open(fd, "rb", closefd=False) as file:
        file.seek(header.starts[name])
        if (n := file.readinto(view)) != len(view):
            raise SessionError(f"tensor {name}: expected {len(view):,} bytes, got {n:,}: the file was cut")
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
        raise SessionError(f"session {quote(path)}: {error}; save the session anew") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SessionError(f"session {quote(path)}: expected a saved session, there is none; check the path") from error
    except RefusedError as error:
        raise SessionError(f"session {quote(path)}: {error.strerror}; check the path") from error
    except OSError as error:
        why = error.strerror or error
        raise StoreError(f"session {quote(path)}: cannot be read ({why}); check the disk") from error
