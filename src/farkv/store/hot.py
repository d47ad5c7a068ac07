"""The hot set of one layer: recently fetched records stay near, so that the next fetch brings only the others.

In: positions that a step chose. Out: where their copies are, and which slots the missing ones may take. What is chosen
never depends on it. The least recently read copy goes first; a record and its copy are the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.ledger import Ledger
from farkv.store.rows import Rows

# Host memory: a record's slot, int32; a slot's record and the fetch that read it last, int32 each.
RECORD_BYTES = 4
SLOT_BYTES = 8


class HotSize(NamedTuple):
    """What a hot set is made of: `slots` near rows of every KV head, for a pool of up to `records`."""

    batch: int
    kv_heads: int
    slots: int
    records: int
    width: int
    dtype: torch.dtype

    @property
    def near_bytes(self) -> int:
        """Bytes of the rows."""
        return self.batch * self.kv_heads * self.slots * self.width * self.dtype.itemsize

    @property
    def book_bytes(self) -> int:
        """Bytes of the books."""
        return self.batch * self.kv_heads * (self.records * RECORD_BYTES + self.slots * SLOT_BYTES)


class Wanted(NamedTuple):
    """One fetch against the hot set; places are (head over all sequences, column of the positions)."""

    here: tuple[Tensor, Tensor]
    # Of those that are here.
    slots: Int[Tensor, " N"]
    missing: tuple[Tensor, Tensor]
    # Which of the missing ones find a slot, and those slots.
    enter: Bool[Tensor, " M"]
    victims: Int[Tensor, " E"]


class Hot:
    """Copies of recently fetched rows of one layer, [B, Hkv, slots, W], and the books that find them."""

    def __init__(self, near: Ledger, device: torch.device, home: Ledger, size: HotSize):
        self.size, self.home = size, home
        self.rows = Rows(near, device=device, reserve=size.slots)
        self.rows.ensure((size.batch, size.kv_heads, size.slots, size.width), size.dtype)
        self.rows.length = size.slots
        home.charge(size.book_bytes)
        heads = size.batch * size.kv_heads
        # A record's slot is only right where that slot's owner is the record: so nothing is undone when a copy goes.
        self.slot_of = torch.zeros(heads, size.records, dtype=torch.int32)
        self.owner = torch.full((heads, size.slots), -1, dtype=torch.int32)
        self.last_read = torch.zeros(heads, size.slots, dtype=torch.int32)
        self.n_fetches = 0

    @property
    def books(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what finds the copies."""
        return self.slot_of, self.owner, self.last_read

    # --- one fetch ------------------------------------------------------------------------------------------

    def find(self, positions: Int[Tensor, "G K"], valid: Bool[Tensor, "G K"] | None) -> Wanted:
        """Say which records are here, and which slots the missing ones get; nothing changes yet.

        Cost: some ten operations on G * K elements, and one choice among G * slots.
        """
        slots = self.slot_of.gather(1, positions).long()
        is_here = self.owner.gather(1, slots) == positions
        is_missing = ~is_here
        if valid is not None:
            is_here &= valid
            is_missing &= valid
        here, missing = locate(is_here), locate(is_missing)
        found = slots[here]
        rank = is_missing.cumsum(1)
        # In host memory: reading a count waits for nothing.
        n = min(self.size.slots, int(rank[:, -1].max()))
        reads = self.last_read.index_put((here[0], found), torch.tensor(self.n_fetches + 1, dtype=torch.int32))
        oldest = reads.topk(n, largest=False)
        at = rank[missing] - 1
        enter = at < n
        head, at = missing[0][enter], at[enter]
        # What this fetch reads stays.
        free = oldest.values[head, at] <= self.n_fetches
        enter[enter.clone()] = free
        return Wanted(here, found, missing, enter, oldest.indices[head[free], at[free]])

    def read(self, wanted: Wanted, out: Tensor) -> None:
        """Copy what is here into its places of `out`, [G, >= K, W], near to near."""
        rows, (head, column) = self.rows.view().flatten(0, 1), wanted.here
        where = head.to(out.device)
        out.index_put_((where, column.to(out.device)), rows[where, wanted.slots.to(out.device)])

    def take_in(self, wanted: Wanted, positions: Int[Tensor, "G K"], rows: Tensor) -> None:
        """Note a fetch as read, and keep those of the missing `rows` ([M, W], near) that found a slot."""
        self.n_fetches += 1
        head, column = (t[wanted.enter] for t in wanted.missing)
        place = head, wanted.victims
        if len(head):
            enter = wanted.enter.to(rows.device)
            near = self.rows.view().flatten(0, 1)
            near.index_put_(tuple(t.to(rows.device) for t in place), rows[enter])
            records = positions[head, column]
            self.owner[place] = records.int()
            self.slot_of[head, records] = wanted.victims.int()
        now = torch.tensor(self.n_fetches, dtype=torch.int32)
        self.last_read.index_put_((wanted.here[0], wanted.slots), now)
        self.last_read.index_put_(place, now)

    # --- the pool changes -----------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget copies of all records but a layer's first `length`: others will stand in their places."""
        self.owner.masked_fill_(self.owner >= length, -1)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction from the pool: record positions[j] is record j from now on."""
        old = positions.reshape(self.owner.shape[0], -1)
        slots = self.slot_of.gather(1, old)
        head, record = (self.owner.gather(1, slots.long()) == old).nonzero(as_tuple=True)
        self.owner.fill_(-1)
        self.owner[head, slots[head, record].long()] = record.int()
        self.slot_of[:, : old.shape[1]] = slots

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Put the sequences in this order, repeats allowed; their number stays."""
        self.rows.select(sequences)
        batch, heads = self.size.batch, self.size.kv_heads
        order = (sequences.cpu()[:, None] * heads + torch.arange(heads)).reshape(batch * heads)
        for book in self.books:
            book.copy_(book[order])

    def clear(self) -> None:
        """Free everything."""
        self.rows.clear()
        self.home.release(self.size.book_bytes)
        self.size = self.size._replace(slots=0, records=0)


def locate(flags: Bool[Tensor, "G K"]) -> tuple[Tensor, Tensor]:
    """Return the head and the column of everything that is true."""
    head, column = flags.nonzero(as_tuple=True)
    return head, column
