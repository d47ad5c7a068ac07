"""Types that the store takes and returns: limits, needs, fetches, reads, and which records stay."""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Bool, Float32, Int, Tensor
from farkv.store.far.page_file import DiskSpace, PageReader
from farkv.store.link import Ticket
from farkv.store.memory import Mover
from farkv.store.shared import Shared
from farkv.store.worker import Worker


class SavedText(NamedTuple):
    """Pages of a text that was read before, and how many tokens each has."""

    reader: PageReader
    n_pages: int
    page_tokens: int


class StoreLimits(NamedTuple):
    """Byte limits (None: unlimited), how records are stored under them, and the context to make room for."""

    near: int | None = None
    host: int | None = None
    reserve_tokens: int = 0
    # Where full pages are written, under its own limit.
    disk: DiskSpace | None = None
    # What a full pool does: "refuse" more records, or evict by the policy of this name.
    evict: str = "refuse"
    # How records are coded: "int8", "int4"; None: not at all.
    quant: str | None = None
    saved: SavedText | None = None
    # What other caches hold under the same limits; None: this one is alone.
    shared: Shared | None = None


class Needs(NamedTuple):
    """What a method needs of its store."""

    # Tokens of the recent window, kept near.
    window: int = 0
    # All records are stored in near memory: the method reads all that it keeps.
    lives_near: bool = False
    # Records may be evicted.
    evicts: bool = False
    # Some records may be pinned near for longer than a step.
    pins: bool = False
    # Kernels that move rows; None: plain operations.
    mover: Mover | None = None
    # The thread that brings records near; None: the store starts its own.
    worker: Worker | None = None
    # Keep scores in float32: sums that grow by small amounts.
    exact_scores: bool = False


class Fetch(NamedTuple):
    """Requested records: their positions, which are valid, and where they are copied, the ticket and buffer."""

    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
    ticket: Ticket | None
    buffer: Tensor | None


class Keep(NamedTuple):
    """Records that stay at an eviction, ascending; the last `gapless` are the newest tokens without a gap."""

    positions: Int[Tensor, "B Hkv K"]
    scores: Float32[Tensor, "B Hkv K"]
    gapless: int


class Stored(NamedTuple):
    """The rows that attention reads at one decode step, as stored, with their positions."""

    rows: Tensor
    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None


class Read(NamedTuple):
    """The keys and values that attention reads at one decode step, with their positions."""

    k: Tensor
    v: Tensor
    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
