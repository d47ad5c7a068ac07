"""Pages of a file in C: where rows are, which pages are missing; and pages read to their places and verified.

In: tables of numbers, an open file. Out: rows by page, or pages in memory. Stateless; of no instruction set.
"""

from __future__ import annotations

import ctypes

import torch

from farkv._axes import Tensor
from farkv.errors import CacheStateError
from farkv.kernels.native_abi import BAD_POSITION, LocateArgs, PageArgs, load_library
from farkv.kernels.ways import refuse
from farkv.math.pages import Located

# Reads of a file that wait at the same time: enough to keep a disk busy.
PAGES_AT_ONCE = 8


def locate(table: Tensor, slot_of: Tensor, heads: Tensor, positions: Tensor, tokens: int) -> Located:
    """Return on which page each row is, the row's place there, and of each page its slot and how many rows are on it.

    Args:
        table: pages of every head, int64 [heads, capacity], contiguous.
        slot_of: the slot of every page, int32, -1: none.
        heads, positions: of each row, int64.
        tokens: rows of a page.

    Returns:
        Pages in the order in which the rows name them.

    Raises:
        CacheStateError: a row is of no page.

    Cost: a few operations a row; one core.
    """
    for each, dtype in ((table, torch.int64), (slot_of, torch.int32), (heads, torch.int64), (positions, torch.int64)):
        if each.dtype is not dtype or not each.is_cpu or not each.is_contiguous():
            refuse(f"contiguous {dtype} in CPU memory", each)
    if table.ndim != 2 or heads.shape != positions.shape or tokens <= 0:
        refuse("pages of every head, as many heads as positions, and tokens of a page", table)
    n = len(heads)
    which, offsets, *of_pages = torch.empty(5, n, dtype=torch.int64).unbind(0)
    pointers = [x.data_ptr() for x in (table, slot_of, heads, positions, which, offsets, *of_pages)]
    args = LocateArgs(*pointers, n, *table.shape, len(slot_of), tokens, 0)
    library = load_library()
    assert library is not None
    if library.farkv_locate(ctypes.addressof(args)) == BAD_POSITION:
        raise CacheStateError("native locate: a row is of no page; ask only for rows that are on full pages")
    return Located(which, offsets, *[x[: args.n_found] for x in of_pages])


def read_pages(file: tuple[int, int, int], sums: list[int], ids: Tensor, at: Tensor, out: Tensor) -> int:
    """Read page ids[j] of a file into place at[j] of `out`, verified; return a j that fails, or how many there are.

    Args:
        file: it is open; where its page 0 begins, and the bytes of a page.
        sums: CRC-32 of each page that is asked for.

    Raises:
        CacheStateError: a place is outside `out`.

    Cost: these pages read, several at a time, and one pass over them for their checksums.
    """
    fd, base, page_bytes = file
    check_pages(page_bytes, sums, ids, at, out)
    expected, library = torch.tensor(sums, dtype=torch.uint32), load_library()
    assert library is not None
    pointers = [x.data_ptr() for x in (ids, at, expected, out)]
    args = PageArgs(*pointers, len(ids), fd, base, page_bytes, PAGES_AT_ONCE)
    return library.farkv_read_pages(ctypes.addressof(args))


def check_pages(page_bytes: int, sums: list[int], ids: Tensor, at: Tensor, out: Tensor) -> None:
    """Raise CacheStateError unless pages may be read into these places of `out`."""
    for each in (ids, at):
        if each.dtype is not torch.int64 or each.shape != (len(sums),) or not each.is_cpu or not each.is_contiguous():
            refuse(f"{len(sums)} times a contiguous int64 in CPU memory", each)
    n_places = out.numel() * out.element_size() // page_bytes if page_bytes > 0 else 0
    places, pages = ([0], [0]) if len(sums) == 0 else (at.tolist(), ids.tolist())
    if (
        not out.is_cpu
        or not out.is_contiguous()
        or min(places) < 0
        or max(places) >= max(1, n_places)
        or min(pages) < 0
    ):
        refuse(f"room for whole pages of {page_bytes} bytes at every place", out)
