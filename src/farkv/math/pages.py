"""Where rows are, as pages: which page each row is on, and which pages that makes.

In: tables of numbers. Out: pages, each once. Knows no bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Int, Tensor


class Located(NamedTuple):
    """Rows by page: row j is row offsets[j] of pages[which[j]].

    pages: each once. slots: where each page is in memory, -1: nowhere. counts: how many of the rows are on it.
    """

    which: Int[Tensor, " N"]
    offsets: Int[Tensor, " N"]
    pages: Int[Tensor, " P"]
    slots: Int[Tensor, " P"]
    counts: Int[Tensor, " P"]


def locate(pages: Int[Tensor, " N"], offsets: Int[Tensor, " N"], slot_of: Int[Tensor, " A"]) -> Located:
    """Return the same rows by page, in the pages' order.

    Args:
        pages, offsets: of each row.
        slot_of: the slot of every page there is.
    """
    found, which, counts = pages.unique(return_inverse=True, return_counts=True)
    return Located(which, offsets, found, slot_of[found].long(), counts)
