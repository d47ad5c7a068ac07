"""Pages by number, through whichever file they are in, and how many tokens one has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farkv.errors import CapacityError, StoreError
from farkv.store.far.page_file import DiskSpace, PageFile
from farkv.store.far.pages import MOST_TOKENS, PAGE_BYTES, NumberedPages, PageForm, count_page_tokens

FORM = PageForm(4, 3, torch.float32)


@pytest.fixture
def space(tmp_path: Path) -> Iterator[DiskSpace]:
    with DiskSpace(tmp_path / "disk", 100 * FORM.n_bytes) as space:
        yield space


def some(n: int) -> torch.Tensor:
    return torch.randn(n, FORM.tokens, FORM.width)


def save(space: DiskSpace, rows: torch.Tensor) -> PageFile:
    file = space.open_file(FORM.n_bytes)
    file.write(rows)
    return file


@pytest.mark.parametrize("record_bytes", [1, 16, 100, 255, 256, 260, 1024, PAGE_BYTES, 3 * PAGE_BYTES])
def test_a_page_is_large_but_not_a_whole_toy_context(record_bytes: int) -> None:
    tokens = count_page_tokens(record_bytes)
    assert tokens.bit_count() == 1
    assert tokens <= MOST_TOKENS
    assert tokens == MOST_TOKENS or tokens * record_bytes >= PAGE_BYTES
    short = count_page_tokens(record_bytes, 4096)
    assert short <= tokens
    assert short in (tokens, 64), "a short context has pages to choose from"
    assert tokens == 1 or tokens * record_bytes < 2 * PAGE_BYTES
    assert PageForm(tokens, record_bytes, torch.uint8).n_bytes == tokens * record_bytes


def test_pages_of_the_saved_text_and_new_ones_come_in_the_order_asked_for(space: DiskSpace) -> None:
    old, new = some(5), some(7)
    # Kept: the pages are gone with their file.
    saved = save(space, old)
    pages = NumberedPages(FORM, space.open_file(FORM.n_bytes), saved._reader, 5)
    told: list[int] = []
    pages.on_read = told.append
    assert pages.write(new[:4]) == 5
    assert pages.write(new[4:]) == 9
    every = torch.cat([old, new])
    for numbers in ([0, 4, 2], [5, 11, 7], [4, 5, 0, 11, 4, 9], [3], [10], []):
        told.clear()
        out = torch.full((len(numbers), FORM.tokens, FORM.width), torch.nan)
        pages.read(torch.tensor(numbers, dtype=torch.int64), out)
        assert torch.equal(out, every[numbers])
        assert sum(told) == len(numbers) * FORM.n_bytes, "every byte is told once"


def test_pages_without_a_file_of_their_own_are_read_from_the_saved_one(space: DiskSpace) -> None:
    old = some(5)
    saved = save(space, old)
    pages = NumberedPages(FORM, None, saved._reader, 5)
    out = torch.empty(2, FORM.tokens, FORM.width)
    pages.read(torch.tensor([1, 3]), out)
    assert torch.equal(out, old[[1, 3]])
    pages.read(torch.tensor([], dtype=torch.int64), out[:0])


def test_what_was_never_written_is_an_error(space: DiskSpace) -> None:
    pages = NumberedPages(FORM, space.open_file(FORM.n_bytes))
    pages.write(some(2))
    with pytest.raises(StoreError, match="pages of the 2"):
        pages.read(torch.tensor([0, 2]), torch.empty(2, FORM.tokens, FORM.width))


def test_a_full_disk_writes_nothing(space: DiskSpace) -> None:
    pages = NumberedPages(FORM, space.open_file(FORM.n_bytes))
    first = some(60)
    pages.write(first)
    with pytest.raises(CapacityError, match="disk limit"):
        pages.write(some(41))
    assert pages.write(some(40)) == 60
    out = torch.empty(60, FORM.tokens, FORM.width)
    pages.read(torch.arange(60), out)
    assert torch.equal(out, first)
