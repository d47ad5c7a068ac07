"""A reader brings the pages of any file, in any order, in few reads, and says which page it cannot vouch for."""

from __future__ import annotations

import copy
import gc
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farkv.errors import StoreError
from farkv.store.far import page_reader as reader_module
from farkv.store.far.page_reader import PageReader, bytes_of

HEAD = b"head"
PAGE = 96


@pytest.fixture
def pages() -> torch.Tensor:
    return torch.randint(0, 256, (40, PAGE), dtype=torch.uint8)


@pytest.fixture
def some(tmp_path: Path, pages: torch.Tensor) -> Iterator[PageReader]:
    """Return a reader of pages in the middle of a file."""
    (tmp_path / "some").write_bytes(HEAD + bytes(bytes_of(pages)) + b"tail")
    with (tmp_path / "some").open("rb") as opened:
        yield PageReader(opened.fileno(), len(HEAD), PAGE, [zlib.crc32(bytes_of(page)) for page in pages], "some file")


def read(reader: PageReader, ids: list[int]) -> torch.Tensor:
    out = torch.empty(len(ids), reader.page_bytes, dtype=torch.uint8)
    reader.read(torch.tensor(ids, dtype=torch.int64), out)
    return out


def test_pages_in_the_middle_of_a_file_come_in_the_order_asked_for(some: PageReader, pages: torch.Tensor) -> None:
    for ids in ([], [0], [39, 0, 1, 1, 38], list(range(40))):
        assert torch.equal(read(some, ids), pages[ids])
    strided, out = torch.arange(40)[::3], torch.empty(14, PAGE, dtype=torch.uint8)
    some.read(strided, out)
    assert torch.equal(out, pages[::3])


def test_runs_are_one_read_each_and_long_ones_are_cut(
    some: PageReader, pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 4 * PAGE)
    sizes: list[int] = []
    preadv = os.preadv

    def count(fd: int, parts: list[memoryview], at: int) -> int:
        sizes.append(sum(map(len, parts)) // PAGE)
        return preadv(fd, parts, at)

    monkeypatch.setattr(os, "preadv", count)
    ids = [7, 8, 9, 3, 3, 4, 20, *range(30, 39), 38, 37]
    assert torch.equal(read(some, ids), pages[ids])
    assert sorted(sizes) == sorted([3, 1, 2, 1, 4, 4, 1, 1, 1])


@pytest.mark.parametrize("page", [40, -1])
def test_pages_that_were_never_written_are_refused(some: PageReader, page: int) -> None:
    with pytest.raises(
        StoreError, match=rf"some file: expected pages of the 40 that were written, got pages {page} to "
    ):
        read(some, [page])


def test_every_reader_thread_has_stopped_when_an_error_is_raised(some: PageReader, pages: torch.Tensor) -> None:
    some.checksums = [0, *some.checksums[1:]]
    out = torch.empty(20, PAGE, dtype=torch.uint8)
    with pytest.raises(StoreError, match="some file: page 0 is damaged: expected checksum 00000000, got"):
        some.read(torch.arange(0, 40, 2), out)
    out.zero_()
    assert torch.equal(read(some, list(range(1, 40))), pages[1:])
    assert not out.any(), "nothing writes to what the caller has back"


def test_a_file_that_ends_early_is_found(some: PageReader, pages: torch.Tensor, tmp_path: Path) -> None:
    os.truncate(tmp_path / "some", len(HEAD) + 38 * PAGE + 5)
    with pytest.raises(StoreError, match="page 38 is cut off: expected 192 bytes from byte 3,652 on, got 5; "):
        read(some, [38, 39])
    assert torch.equal(read(some, [37, 2]), pages[[37, 2]])


def test_an_input_error_is_an_error_of_the_store(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a folder: the system refuses to read it
    try:
        with pytest.raises(StoreError, match="some: page 0 cannot be read at byte 0: expected 8 bytes, got the error"):
            read(PageReader(fd, 0, 8, [0], "some"), [0])
    finally:
        os.close(fd)


def test_threads_end_with_their_reader(some: PageReader) -> None:
    before = threading.enumerate()
    own = PageReader(some.fd, some.base, PAGE, some.checksums, "own")
    assert copy.deepcopy(own) is own
    read(own, [0])
    assert threading.enumerate() == before, "one run needs no thread"
    read(own, [0, 2, 4, 6, 8])
    mine = [t for t in threading.enumerate() if t not in before]
    assert 0 < len(mine) <= reader_module.READERS
    del own
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
