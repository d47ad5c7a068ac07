"""All pages of one cache by number: first those of a saved session, then those written since.

In: rows of whole pages. Out: their numbers, and verified pages by number. Pages never change once they are written,
so copies of a cache share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.page_file import PageFile, PageReader

# What one read from disk brings at least, on real shapes.
PAGE_BYTES = 64 * 1024
# Tokens of a page where records are tiny: a page of a toy model must not be its whole context.
MOST_TOKENS = 256
# Pages that a context should have at least, so that a share of them can be chosen; and the least tokens of one.
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
    """Return the tokens of a page: a power of two, of 64 KiB or more where records have 256 bytes or more.

    A short context gets smaller pages: of SOME_PAGES a step can still choose some.

    Args:
        context: tokens that are expected; 0: many.
    """
    tokens = 1
    while tokens * record_bytes < PAGE_BYTES and tokens < MOST_TOKENS:
        tokens *= 2
    while context and tokens > LEAST_TOKENS and tokens * SOME_PAGES > context:
        tokens //= 2
    return tokens


class NumberedPages:
    """Numbered pages, read through whichever file they are in."""

    def __init__(self, form: PageForm, file: PageFile | None, saved: PageReader | None = None, n_saved: int = 0):
        self.form, self.file, self.saved, self.n_saved = form, file, saved, n_saved
        # Told the bytes of every read.
        self.on_read: Callable[[int], None] = lambda n_bytes: None

    def write(self, rows: Tensor) -> int:
        """Append whole pages; return the number of the first.

        Raises:
            CapacityError, StoreError: nothing was written.
        """
        assert self.file is not None
        return self.n_saved + self.file.write(rows)

    def read(self, numbers: Int[Tensor, " N"], out: Tensor) -> None:
        """Bring pages, verified, into `out` ([N, tokens, W], contiguous).

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        old = numbers < self.n_saved
        if bool(old.any()) and not bool(old.all()):
            # Rare: records of the saved text beside records of this run.
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
