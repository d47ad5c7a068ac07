"""All pages of one cache by number: first those of a saved session, then those written since.

In: rows of whole pages. Out: their numbers, and verified pages by number. Written pages never change, so copies of a
cache share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.page_file import PageFile, PageReader

# Least bytes of a page on real shapes: what makes a disk read efficient.
PAGE_BYTES = 64 * 1024
# Most tokens of a page: where records are tiny, a page must not be the whole context.
MOST_TOKENS = 256
# Pages that a short context should have, so that a step can choose some of them; least tokens of a page then.
SOME_PAGES, LEAST_TOKENS = 64, 16


class PageForm(NamedTuple):
    """The shape of a page: consecutive tokens of one layer, sequence and KV head."""

    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of a page."""
        return self.tokens * self.width * self.dtype.itemsize


def count_page_tokens(record_bytes: int, context: int = 0) -> int:
    """Return the tokens of a page: a power of two, at least 64 KiB where records have 256 bytes or more.

    A short context gets smaller pages, SOME_PAGES or more, so that a step can choose some of them.

    Args:
        context: expected tokens; 0: long, or not known.
    """
    tokens = 1
    while tokens * record_bytes < PAGE_BYTES and tokens < MOST_TOKENS:
        tokens *= 2
    while context and tokens > LEAST_TOKENS and tokens * SOME_PAGES > context:
        tokens //= 2
    return tokens


class NumberedPages:
    """Pages by number, each read from the file that it is in."""

    def __init__(self, form: PageForm, file: PageFile | None, saved: PageReader | None = None, n_saved: int = 0):
        self.form, self.file, self.saved, self.n_saved = form, file, saved, n_saved
        # Called with the bytes of every read.
        self.on_read: Callable[[int], None] = lambda n_bytes: None

    def write(self, rows: Tensor) -> int:
        """Append whole pages; return the number of the first.

        Raises:
            CapacityError, StoreError: nothing was written.
        """
        assert self.file is not None
        return self.n_saved + self.file.write(rows)

    def read(self, numbers: Int[Tensor, " N"], out: Tensor) -> None:
        """Read pages into `out` ([N, tokens, W], contiguous), verified.

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        old = numbers < self.n_saved
        if bool(old.any()) and not bool(old.all()):
            # Rare: pages of the saved text and of this run in one read.
            for part in (old, ~old):
                at = part.nonzero()[:, 0]
                piece = torch.empty(len(at), *out.shape[1:], dtype=out.dtype)
                self.read(numbers[at], piece)
                out[at] = piece
        elif len(numbers):
            self.on_read(len(numbers) * self.form.n_bytes)
            source = self.saved if bool(old.all()) else self.file
            assert source is not None
            source.read(numbers - (0 if source is self.saved else self.n_saved), out)
