"""Records of one layer on disk: full pages in a file, the newest records in an open page in host memory.

In: new rows. Out: rows by position, read through the page cache. The same interface as `Rows`, except that records are
never evicted: only copies leave host memory.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.errors import ConfigError
from farkv.store.far.in_flight import Coming, OpenRows
from farkv.store.far.page_cache import PageCache
from farkv.store.far.pages import NumberedPages
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger

# Bytes of a page number, int64.
NUMBER_BYTES = 8
# Tokens that pass through host memory at once on their way to a GPU: whole pages.
PIECE_TOKENS = 1024


class PagedRows:
    """Rows of one layer, logically [B, Hkv, S, W]: a table of page numbers, and an open page."""

    def __init__(self, ledger: Ledger, page_cache: PageCache):
        self.ledger, self.page_cache = ledger, page_cache
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
        """Return the tokens stored: pages are added as needed."""
        return self.length

    @property
    def width(self) -> int:
        """Return the number of elements of a row."""
        return self.pages.form.width

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the elements."""
        return self.pages.form.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes in host memory, without page copies."""
        return self.table.n_bytes + self.open.n_bytes

    @property
    def n_written(self) -> int:
        """Tokens in full pages, which are on disk."""
        return self.table.length * self.pages.form.tokens

    @property
    def is_whole(self) -> bool:
        """Say whether the pages hold as many rows as there are."""
        return self.length == self.n_written + self.open.length

    def append(self, *parts: Tensor) -> None:
        """Add rows, and write the pages that become full.

        Raises:
            ConfigError: the rows' width or dtype is not that of the pages.
            CapacityError, StoreError: the disk has no room or fails; nothing was added.
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
            except BaseException:  # an interrupt, too, is raised again below
                # No table names the partly written page: undo the append.
                self.cut(n_before)
                raise

    def _write_full(self) -> None:
        """Write the open rows that fill whole pages: head by head, in the order of tokens."""
        tokens = self.pages.form.tokens
        batch, heads = self.open.heads
        n, n_tabled = self.open.length // tokens, self.table.length
        rest = Rows(self.ledger, device=self.device, reserve=tokens)
        try:
            if self.open.length > n * tokens:
                rest.append(self.open.view()[:, :, n * tokens :])
            # A deliberate copy where there is more than one head: a single write, all or nothing.
            rows = self.open.view()[:, :, : n * tokens].reshape(-1, tokens, self.width).contiguous()
            first = self.pages.write(rows)
            self.table.append(torch.arange(first, first + len(rows)).view(batch, heads, n, 1))
            old, self.open = self.open, rest
        except BaseException:
            self.table.cut(n_tabled)
            rest.clear()
            raise
        old.clear()
        self.page_cache.offer(first, rows)

    def take_pages(self, numbers: Int[Tensor, "B Hkv P 1"]) -> None:
        """Start with pages that were written before."""
        assert self.length == 0
        if numbers.shape[2]:
            self.table.append(numbers)
        self.length = self.n_written

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows of tokens `start` to `stop`, [B, Hkv, stop - start, W], without changing the page cache.

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

    def copy_to(self, out: Tensor) -> None:
        """Copy all rows into `out`, a new [B, Hkv, S, W] anywhere, without changing the page cache.

        Cost: S * W elements of every head copied once; pages without a copy are read from disk, in host memory straight
        to where they belong.
        """
        n, form = self.n_written, self.pages.form
        if out.device.type != "cpu":
            for start in range(0, self.length, PIECE_TOKENS):
                stop = min(start + PIECE_TOKENS, self.length)
                out[:, :, start:stop].copy_(self.read(start, stop))
            return
        if n:
            with self.page_cache.lock:
                # Head by head: in `out` only the pages of one head lie together.
                for place, numbers in zip(out.flatten(0, 1), self.table.view().flatten(0, 1)[..., 0], strict=True):
                    self._read_pages(numbers, place[:n].view(-1, form.tokens, form.width))
        if n < self.length:
            out[:, :, n:].copy_(self.open.view())

    def _read_pages(self, numbers: Tensor, out: Tensor) -> None:
        self.page_cache.settle()
        slots = self.page_cache.find(numbers)
        missing = (slots < 0).nonzero()[:, 0]
        if len(missing) == len(numbers):
            self.pages.read(numbers, out)
            return
        here = (slots >= 0).nonzero()[:, 0]
        out[here] = self.page_cache.data[slots[here].long()]
        done = 0
        for rows in self.page_cache.load(numbers[missing]) if len(missing) else ():
            out[missing[done : done + len(rows)]] = rows
            done += len(rows)

    def take(self, heads: Int[Tensor, " N"], positions: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy the row at `positions[j]` of head `heads[j]` (sequence * Hkv + head) into `out[j]`.

        Cost: N * W elements; pages without a copy are read from disk and cached.
        """
        with self.page_cache.lock:
            # A deliberate wait: others may have planned what these rows are on.
            self.page_cache.settle()
            coming = self.plan(heads, positions)
            try:
                self.bring(coming, out)
            finally:
                self.end(coming)

    def plan(self, heads: Int[Tensor, " N"], positions: Int[Tensor, " N"]) -> Coming:
        """Decide now what `bring` copies later, on any thread, and `end` forgets: as `take`."""
        n_written, n = self.n_written, len(positions)
        if n_written and (n == 0 or int(positions.max()) < n_written):
            return Coming(self.page_cache.plan_rows(self._numbers(), heads.contiguous(), positions.contiguous()), None)
        late = positions >= n_written
        at, early = late.nonzero()[:, 0], (~late).nonzero()[:, 0]
        rows = torch.empty(len(at), self.width, dtype=self.dtype)
        # The open page may be written meanwhile.
        self.open.take(heads[at], positions[at] - n_written, rows)
        plan = None if len(early) == 0 else self.page_cache.plan_rows(self._numbers(), heads[early], positions[early])
        return Coming(plan, OpenRows(at, rows, early))

    def bring(self, coming: Coming, out: Tensor) -> None:
        """Copy what was planned into `out`, [N, W].

        Raises:
            StoreError: a page is damaged or cannot be read.
        """
        plan, part = coming
        if part is None:
            assert plan is not None
            self.page_cache.bring(plan, out)
            return
        out[part.places] = part.rows
        if plan is not None:
            rows = torch.empty(len(part.others), self.width, dtype=self.dtype)
            self.page_cache.bring(plan, rows)
            out[part.others] = rows

    def end(self, coming: Coming) -> None:
        """Note that what was planned has been waited for."""
        if coming.plan is not None:
            self.page_cache.end(coming.plan)

    def _numbers(self) -> Tensor:
        """Return the pages of every head, [B * Hkv, capacity]."""
        assert self.table.data is not None
        return self.table.data.flatten(0, 1)[..., 0]

    def resident(self) -> Bool[Tensor, "B Hkv P"]:
        """Return which full pages have a copy in host memory."""
        if self.table.data is None:
            return torch.empty(*self.heads, 0, dtype=torch.bool)
        return self.page_cache.resident(self.table.view()[..., 0])

    def cut(self, length: int) -> None:
        """Remove all rows but the first `length`; a full page that is cut becomes the open page."""
        length, tokens = min(max(0, length), self.n_written + self.open.length), self.pages.form.tokens
        with self.page_cache.lock:
            if length >= self.n_written:
                self.open.cut(length - self.n_written)
            else:
                first = length // tokens
                rest = Rows(self.ledger, device=self.device, reserve=tokens)
                if length > first * tokens:
                    rows = self.read(first * tokens, length)
                    # One page of every head, while the old open page still exists.
                    self.page_cache.make_room(rows.shape[0] * rows.shape[1] * self.pages.form.n_bytes)
                    rest.append(rows)
                # Table and open page belong together: nothing may come between these.
                old, self.table.length, self.open = self.open, first, rest
                old.clear()
            self.length = length

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order: full pages are shared, open ones copied."""
        with self.page_cache.lock:
            if len(sequences) != self.heads[0]:
                # Drop page copies to make room for the sequences.
                self.page_cache.make_room(self.n_bytes * len(sequences) // max(1, self.heads[0]))
            self.table.select(sequences)
            self.open.select(sequences)

    def clear(self) -> None:
        """Free the tables. The file frees its pages, the page cache its copies."""
        self.table.clear()
        self.open.clear()
        self.length = 0
