"""Records of one layer on disk: full pages in a file, the newest ones in an open page in host memory.

In: new rows. Out: rows by position, through host copies of pages. The same face as `Rows`; nothing is ever lost, so
nothing is evicted here: what goes from host memory is a copy.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.errors import ConfigError
from farkv.store.far.page_cache import PageCache
from farkv.store.far.pages import NumberedPages
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger

# The number of a page, int64.
NUMBER_BYTES = 8


class PagedRows:
    """Rows of one layer, [B, Hkv, S, W] in thought: a table of page numbers, and an open page."""

    def __init__(self, ledger: Ledger, frames: PageCache):
        self.ledger, self.page_cache = ledger, frames
        self.device = torch.device("cpu")
        self.table = Rows(ledger, device=self.device)
        self.open = Rows(ledger, device=self.device)
        self.reserve = 0
        self.length = 0

    @property
    def pages(self) -> NumberedPages:
        """All pages of the cache."""
        return self.page_cache.pages

    @property
    def heads(self) -> tuple[int, int]:
        """Return the number of sequences and of KV heads."""
        return self.table.heads if self.table.data is not None else self.open.heads

    @property
    def capacity(self) -> int:
        """Return the tokens stored: there is always room for more, or an error."""
        return self.length

    @property
    def width(self) -> int:
        """Return the elements of a row."""
        return self.pages.form.width

    @property
    def dtype(self) -> torch.dtype:
        """Return the elements' type."""
        return self.pages.form.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes in host memory, page copies aside."""
        return self.table.n_bytes + self.open.n_bytes

    @property
    def n_written(self) -> int:
        """Tokens in full pages."""
        return self.table.length * self.pages.form.tokens

    def append(self, *parts: Tensor) -> None:
        """Add rows; pages that become full are written.

        Raises:
            ConfigError: the rows are not of the pages' form.
            CapacityError, StoreError: the disk has no room or fails; then nothing was added.
        """
        n_before, width = self.length, sum(part.shape[-1] for part in parts)
        if (width, parts[0].dtype) != (self.width, self.dtype):
            raise ConfigError(
                f"disk: expected records of {self.width} elements of {self.dtype} in every layer, as in the first one, "
                f"got {width} of {parts[0].dtype}; leave disk out for this model"
            )
        self.open.reserve = self.pages.form.tokens
        self.open.append(*parts)
        self.length += parts[0].shape[2]
        if self.pages.file is not None and self.open.length >= self.pages.form.tokens:
            try:
                with self.page_cache.lock:
                    self._write_full()
            except Exception:
                # The torn page is on no table: what was there before still is.
                self.open.crop(self.length - n_before)
                self.length = n_before
                raise

    def _write_full(self) -> None:
        """Write the open rows that fill pages: pages of one head lie together, in the order of tokens."""
        tokens = self.pages.form.tokens
        batch, heads = self.open.heads
        n = self.open.length // tokens
        rest = Rows(self.ledger, device=self.device, reserve=tokens)
        try:
            if self.open.length > n * tokens:
                rest.append(self.open.view()[:, :, n * tokens :])
            # A deliberate copy, where there are more heads than one: one write, and nothing is half written.
            rows = self.open.view()[:, :, : n * tokens].reshape(-1, tokens, self.width).contiguous()
            first = self.pages.write(rows)
            self.table.append(torch.arange(first, first + len(rows)).view(batch, heads, n, 1))
        except BaseException:
            rest.clear()
            raise
        self.open.clear()
        self.open = rest
        self.page_cache.offer(first, rows)

    def take_pages(self, numbers: Int[Tensor, "B Hkv P 1"]) -> None:
        """Hold pages that were written before, and nothing else so far."""
        assert self.length == 0
        if numbers.shape[2]:
            self.table.append(numbers)
        self.length = self.n_written

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows of tokens `start` to `stop`, [B, Hkv, stop - start, W]; page copies stay as they are.

        Cost: (stop - start) * W elements of every head copied; pages without a copy are read from disk.
        """
        batch, heads = self.heads
        tokens = self.pages.form.tokens
        n_written = self.n_written
        if start == stop:
            return torch.empty(batch, heads, 0, self.width, dtype=self.dtype)
        if start >= n_written:
            return self.open.read(start - n_written, stop - n_written)
        first, last = start // tokens, -(-min(stop, n_written) // tokens)
        with self.page_cache.lock:
            numbers = self.table.view()[:, :, first:last, 0].reshape(-1)
            rows = torch.empty(len(numbers), tokens, self.width, dtype=self.dtype)
            self._read_pages(numbers, rows)
        rows = rows.view(batch, heads, (last - first) * tokens, self.width)[:, :, start - first * tokens :]
        if stop <= n_written:
            return rows[:, :, : stop - start]
        return torch.cat([rows, self.open.read(0, stop - n_written)], 2)

    def _read_pages(self, numbers: Tensor, out: Tensor) -> None:
        frames = self.page_cache.find(numbers)
        missing = (frames < 0).nonzero()[:, 0]
        if len(missing) == len(numbers):
            self.pages.read(numbers, out)
            return
        here = (frames >= 0).nonzero()[:, 0]
        out[here] = self.page_cache.data[frames[here].long()]
        done = 0
        for rows in self.page_cache.load(numbers[missing]) if len(missing) else ():
            out[missing[done : done + len(rows)]] = rows
            done += len(rows)

    def take(self, heads: Int[Tensor, " N"], positions: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy the row at `positions[j]` of head `heads[j]` (sequence * Hkv + head) into `out[j]`.

        Cost: N * W elements; pages that have no copy in host memory are read from disk, and then have one.
        """
        tokens = self.pages.form.tokens
        with self.page_cache.lock:
            n_written = self.n_written
            late = positions >= n_written
            if bool(late.any()):
                at = late.nonzero()[:, 0]
                rows = torch.empty(len(at), self.width, dtype=self.dtype)
                self.open.take(heads[at], positions[at] - n_written, rows)
                out[at] = rows
            early = (~late).nonzero()[:, 0]
            if len(early):
                assert self.table.data is not None
                where = heads[early] * self.table.data.shape[2] + positions[early] // tokens
                numbers = self.table.data.view(-1)[where]
                whole = len(early) == len(positions)
                rows = out if whole else torch.empty(len(early), self.width, dtype=self.dtype)
                self.page_cache.take(numbers, positions[early] % tokens, rows)
                if not whole:
                    out[early] = rows

    def resident(self) -> Bool[Tensor, "B Hkv P"]:
        """Say which full pages have a copy in host memory."""
        if self.table.data is None:
            return torch.empty(*self.heads, 0, dtype=torch.bool)
        return self.page_cache.resident(self.table.view()[..., 0])

    def crop(self, n_tokens: int) -> None:
        """Forget the `n_tokens` newest rows; a page that was full is opened again."""
        length, tokens = max(0, self.length - n_tokens), self.pages.form.tokens
        with self.page_cache.lock:
            if length >= self.n_written:
                self.open.crop(self.length - length)
            else:
                first = length // tokens
                rest = Rows(self.ledger, device=self.device, reserve=tokens)
                if length > first * tokens:
                    rows = self.read(first * tokens, length)
                    # One page of every head, for a moment beside the one that was open.
                    self.page_cache.make_room(rows.shape[0] * rows.shape[1] * self.pages.form.n_bytes)
                    rest.append(rows)
                self.table.crop(self.table.length - first)
                self.open.clear()
                self.open = rest
            self.length = length

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order: full pages are shared, open ones copied."""
        with self.page_cache.lock:
            if len(sequences) != self.heads[0]:
                # Copies of pages go before the sequences find no room.
                self.page_cache.make_room(self.n_bytes * len(sequences) // max(1, self.heads[0]))
            self.table.select(sequences)
            self.open.select(sequences)

    def clear(self) -> None:
        """Free the tables; pages go with their file, copies with the frames."""
        self.table.clear()
        self.open.clear()
        self.length = 0
