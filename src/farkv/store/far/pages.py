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
from farkv.store.memory import Mover

# Bytes of a page on real shapes. Four times as many are read as fast and answer worse: a page is chosen whole
# (docs/tiers.md).
PAGE_BYTES = 16 * 1024
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
    """Return the tokens of a page: a power of two, at least 16 KiB where records have 64 bytes or more.

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

    @property
    def count(self) -> int:
        """Return how many pages there are."""
        return self.n_saved + (0 if self.file is None else self.file.n_pages)

    def use(self, mover: Mover | None) -> None:
        """Read by these kernels from now on."""
        if self.file is not None:
            self.file.use(mover)
        if self.saved is not None:
            self.saved.mover = mover

    def write(self, rows: Tensor) -> int:
        """Append whole pages; return the number of the first.

        Raises:
            CapacityError, StoreError: nothing was written.
        """
        assert self.file is not None
        return self.n_saved + self.file.write(rows)

    def read(self, numbers: Int[Tensor, " N"], out: Tensor, at: Int[Tensor, " N"] | None = None) -> None:
        """Read pages into `out` ([M, tokens, W], contiguous), verified: page j into place at[j], or j.

        Raises:
            StoreError: a page is damaged or cannot be read; what is in those places is not known.
        """
        if len(numbers) == 0:
            return
        at = torch.arange(len(numbers)) if at is None else at
        old = numbers < self.n_saved
        if bool(old.any()) and not bool(old.all()):
            # Rare: pages of the saved text and of this run in one read.
            for part in (old, ~old):
                self.read(numbers[part], out, at[part])
            return
        self.on_read(len(numbers) * self.form.n_bytes)
        source = self.saved if bool(old.all()) else self.file
        assert source is not None
        source.read(numbers - (0 if source is self.saved else self.n_saved), out, at)
