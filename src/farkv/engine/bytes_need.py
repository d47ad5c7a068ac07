"""The numbers of admission: what is needed, what is held, what is allowed.

Nothing here knows a tensor or a store, so that plans can be made, and tested, of numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from farkv.errors import CapacityError
from farkv.store.ledger import refuse
from farkv.store.shared import Others
from farkv.store.sizes import LayerShape


class SharesNeed(NamedTuple):
    """For layers with shares: each one's rows at the widest moment, and further bytes counted with them."""

    rows: dict[int, int]
    besides: int


class PoolNeed(NamedTuple):
    """For a pool that evicts when full: what is never evicted, bytes per row, rows held, rows it has room for.

    capacity: 0 where it is not known yet.
    """

    sinks: int
    recent: int
    row_bytes: int
    length: int
    capacity: int


class Need(NamedTuple):
    """What a pass, or an announced context, needs.

    tokens, n_rows: of the context at its widest, evicted tokens included and not.  n_new: tokens of the pass.  chunk:
    how many of them are read at once, where they are announced and not yet there; 0: they are there, all at once.
    stored_bytes: of one record as it is stored.  row_bytes: counted with it.  dense_layers: that are read whole by
    design.  index_bytes, read_rows, pinned_bytes: of a context of so many tokens: bytes of one layer's index, records
    that one layer reads at most per KV head, bytes that a plan pins near.  assembles: every step reads every record, so
    that it is the model's own attention, bit for bit, where a layer that is paged or coded is put together near.
    n_groups: how often the model repeats what is put together only to be read.  expands: and what it reads at all.
    """

    shape: LayerShape
    layers: list[int]
    tokens: int
    n_rows: int
    n_new: int
    chunk: int
    reserve_tokens: int
    stored_bytes: int
    row_bytes: int
    window: int
    dense_layers: frozenset[int]
    index_bytes: Callable[[int], int]
    read_rows: Callable[[int], int]
    pinned_bytes: Callable[[int], int]
    is_coded: bool = False
    evicts: bool = False
    verifies: bool = False
    decodes: bool = False
    keep: SharesNeed | None = None
    pool: PoolNeed | None = None
    assembles: bool = False
    n_groups: int = 1
    expands: bool = False

    @property
    def remembers(self) -> bool:
        """Whether all records are kept besides, as the model made them, to verify against."""
        return self.verifies and (self.evicts or self.is_coded)

    @property
    def n_at_once(self) -> int:
        """Return the tokens that are read at once."""
        return min(self.chunk, self.n_new) if self.chunk else self.n_new

    @property
    def is_announced(self) -> bool:
        """Say whether memory for the whole context is taken at once."""
        return self.reserve_tokens >= self.tokens


class PageSize(NamedTuple):
    """The form of a disk's pages."""

    tokens: int
    n_bytes: int


class ByteLimits(NamedTuple):
    """What is allowed, in bytes; None where there is no limit.

    home: of the tier where records live, `home_name`.  near_shares_host: near memory is no tier of its own, its bytes
    count against the host limit.  is_far: records are copied before attention.  pins: a plan holds records near.
    page: where records are on disk.  near_others, host_others: of these limits other caches hold so much besides, and
    so much of that are copies, which they give back where this cache needs the room.
    """

    near: int | None
    host: int | None
    home: int | None
    home_name: str
    is_far: bool
    near_shares_host: bool = False
    pins: bool = False
    page: PageSize | None = None
    disk: int | None = None
    near_others: Others = Others()
    host_others: Others = Others()

    def refuse(self, tier: str, needed: int, purpose: str) -> CapacityError:
        """Return the error for bytes that exceed what other caches leave of a tier's limit."""
        limit = self.near if tier == "near" else self.host
        others = self.near_others if tier == "near" else self.host_others
        return refuse(tier, (limit or 0) + others.held, needed, purpose, others.held)


class SetsHeld(NamedTuple):
    """Recently used sets that there are: records each layer's can find, sequences, near bytes, metadata bytes."""

    records: dict[int, int]
    batch: int
    near_bytes: int
    metadata_bytes: int


class PagesHeld(NamedTuple):
    """Pages that there are: on disk, of a saved text, in page tables; copies there is room for, and those used."""

    has_file: bool
    n_saved: int
    n_tabled: int
    room: int
    used: int
    scratch: int
    disk_used: int


class Held(NamedTuple):
    """What is allocated now: rows and bytes of each layer, bytes of each tier.

    metadata_has_room: the places and scores of evictable records need not grow for the next row.
    """

    capacity: dict[int, int]
    layer_bytes: dict[int, int]
    near_used: int = 0
    index_used: int = 0
    home_used: int = 0
    home_grows: bool = True
    remembers: bool = False
    metadata_has_room: bool = True
    sets: SetsHeld | None = None
    pages: PagesHeld | None = None
