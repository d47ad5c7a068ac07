"""The recently used set of one layer: fetched records stay near, so that the next fetch brings only the others.

In: positions that a step chose. Out: the slots of their copies, and free slots for those that are missing. It never
influences what is chosen. The least recently read copy is evicted first; a copy equals its record byte for byte.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger

# Host memory: a record's slot, int32; a slot's record and the number of its last fetch, int32 each.
RECORD_BYTES = 4
SLOT_BYTES = 8


class RecentSize(NamedTuple):
    """The size of a recently used set: `slots` near rows of every KV head, for a pool of up to `records`."""

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
    def metadata_bytes(self) -> int:
        """Bytes of the tables that find the rows."""
        return self.batch * self.kv_heads * (self.records * RECORD_BYTES + self.slots * SLOT_BYTES)


class Wanted(NamedTuple):
    """The result of looking up one fetch; `missing` is heads, numbered over all sequences, and columns of positions.

    enter: which of the missing records get a slot, None where all do.
    """

    records: Int[Tensor, "G K"]
    # The slot where each record is or will be; undefined for one that gets no slot.
    slots: Int[Tensor, "G K"]
    missing: tuple[Int[Tensor, " M"], Int[Tensor, " M"]]
    enter: Bool[Tensor, " M"] | None


class RecentlyUsed:
    """Copies of recently fetched rows of one layer, [B, Hkv, slots, W], and the tables that find them."""

    def __init__(self, near: Ledger, device: torch.device, home: Ledger, size: RecentSize):
        self.size, self.home = size, home
        self.rows = Rows(near, device=device, reserve=size.slots)
        self.rows.ensure((size.batch, size.kv_heads, size.slots, size.width), size.dtype)
        self.rows.length = size.slots
        # An empty slot may be read where a position is invalid: it is masked, but must be finite.
        self.rows.view().zero_()
        home.charge(size.metadata_bytes)
        heads = size.batch * size.kv_heads
        # A record's slot is valid only if that slot's owner is the record, so evicting a copy needs no update here.
        self.slot_of = torch.zeros(heads, size.records, dtype=torch.int32)
        self.owner = torch.full((heads, size.slots), -1, dtype=torch.int32)
        self.last_read = torch.zeros(heads, size.slots, dtype=torch.int32)
        self.n_fetches = 0
        # The first slot of every head, in the numbering over all heads.
        self.first = (torch.arange(heads) * size.slots)[:, None]
        # The link's thread fetches through it while another cache's admission may ask for its memory.
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> RecentlyUsed:
        # Copies are not copied: the twin's ledgers give their bytes back, and its next step makes sets of its own.
        twin = object.__new__(RecentlyUsed)
        twin.home, twin.size = copy.deepcopy(self.home, memo), self.size._replace(slots=0, records=0)
        near = copy.deepcopy(self.rows.ledger, memo)
        twin.rows, twin.lock = Rows(near, device=self.rows.device), threading.RLock()
        near.release(self.rows.n_bytes)
        twin.home.release(self.size.metadata_bytes)
        return twin

    @property
    def is_open(self) -> bool:
        """Say whether it still has its memory."""
        return self.rows.data is not None

    @property
    def metadata(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables that find the copies."""
        return self.slot_of, self.owner, self.last_read

    # --- one fetch ------------------------------------------------------------------------------------------

    def find(self, positions: Int[Tensor, "G K"], valid: Bool[Tensor, "G K"] | None) -> Wanted:
        """Return which records are missing, and the slots that they get; the others count as read.

        Cost: some ten operations on G * K elements, and where records are missing, one top-k over G * slots.
        """
        self.n_fetches += 1
        slots = self.slot_of.gather(1, positions).long()
        is_here = self.owner.gather(1, slots) == positions
        self.last_read.view(-1).index_fill_(0, (slots + self.first)[is_here], self.n_fetches)
        is_missing = ~is_here if valid is None else ~is_here & valid
        head, column = is_missing.nonzero(as_tuple=True)
        if len(head) == 0:
            return Wanted(positions, slots, (head, column), None)
        # In host memory: reading a count needs no sync.
        rank = is_missing.cumsum(1)
        n = min(self.size.slots, int(rank[:, -1].max()))
        oldest = self.last_read.topk(n, largest=False)
        at = rank[head, column] - 1
        if positions.shape[1] <= self.size.slots:
            slots[head, column] = oldest.indices[head, at]
            return Wanted(positions, slots, (head, column), None)
        # Copies that this fetch reads must stay.
        enter = (at < n) & (oldest.values[head, at.clamp(max=n - 1)] < self.n_fetches)
        slots[head[enter], column[enter]] = oldest.indices[head[enter], at[enter]]
        return Wanted(positions, slots, (head, column), enter)

    def take_in(self, wanted: Wanted, rows: Tensor) -> None:
        """Store those of the missing `rows` ([M, W], near) that get a slot."""
        head, column = wanted.missing
        if wanted.enter is not None:
            rows, head, column = rows[wanted.enter.to(rows.device)], head[wanted.enter], column[wanted.enter]
        slots, records = wanted.slots[head, column], wanted.records[head, column]
        at = slots + self.first[head, 0]
        # Nobody's until the row is there: a copy that is stopped half way is never read.
        self.owner.view(-1).index_fill_(0, at, -1)
        self.rows.view().view(-1, self.size.width).index_copy_(0, at.to(rows.device), rows)
        self.owner.view(-1).index_copy_(0, at, records.int())
        self.last_read.view(-1).index_fill_(0, at, self.n_fetches)
        self.slot_of[head, records] = slots.int()

    def read(self, wanted: Wanted, out: Tensor) -> None:
        """Copy the records that have a slot into `out`, [B, Hkv, K, W], near to near; other rows are undefined."""
        shape = self.size.batch, self.size.kv_heads, out.shape[2]
        self.rows.take_each(wanted.slots.view(shape).to(out.device), out)

    # --- the pool changes -----------------------------------------------------------------------------------

    def crop(self, now: Cropped) -> None:
        """Drop the copies of cropped records: other records will take their positions."""
        self.owner.masked_fill_(self.owner >= now.length, -1)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction from the pool: record positions[j] becomes record j."""
        old = positions.to(self.owner.device).reshape(self.owner.shape[0], -1)
        slots = self.slot_of.gather(1, old)
        head, record = (self.owner.gather(1, slots.long()) == old).nonzero(as_tuple=True)
        self.owner.fill_(-1)
        self.owner[head, slots[head, record].long()] = record.int()
        self.slot_of[:, : old.shape[1]] = slots

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Reorder the sequences, repeats allowed; their number must stay the same."""
        self.rows.select(sequences)
        batch, heads = self.size.batch, self.size.kv_heads
        order = (sequences.cpu()[:, None] * heads + torch.arange(heads)).reshape(batch * heads)
        for table in self.metadata:
            table.copy_(table[order])

    def clear(self) -> None:
        """Free everything."""
        with self.lock:
            self.rows.clear()
            self.home.release(self.size.metadata_bytes)
            self.size = self.size._replace(slots=0, records=0)


def give_sets_back(sets: dict[int, RecentlyUsed], near: Ledger, device: torch.device) -> None:
    """Free all sets of a cache for another one, on the other's thread."""
    if sets and device.type == "cuda":
        # A deliberate sync: a fetch on the side stream may still read them.
        torch.cuda.synchronize(device)
    for layer in list(sets):
        # Each waits for the fetch that goes through it now.
        sets.pop(layer).clear()
    near.promise(max(0, near.promised - near.copies))
