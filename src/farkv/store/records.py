"""What goes into the store and comes out of it: limits, fetches, reads, and which records stay."""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Bool, Float32, Int, Tensor
from farkv.store.far.page_file import DiskSpace, PageReader
from farkv.store.link import Ticket
from farkv.store.memory import Mover


class SavedText(NamedTuple):
    """Pages of a text that was read before, and how many tokens each has."""

    reader: PageReader
    n_pages: int
    page_tokens: int


class StoreLimits(NamedTuple):
    """Byte limits, how records are kept under them, and the context to make room for; None where nothing is said."""

    near: int | None = None
    host: int | None = None
    reserve_tokens: int = 0
    # Where full pages go, under a limit of its own.
    disk: DiskSpace | None = None
    # What goes when the pool is full: "refuse", or a policy's name.
    evict: str = "refuse"
    # How records are stored: "int8", "int4", or as they came.
    quant: str | None = None
    saved: SavedText | None = None


class Needs(NamedTuple):
    """What a method asks of its store: rows kept near as a window, whether records live near, whether they may go."""

    window: int = 0
    # Near memory holds the records themselves: what is kept is all there is to read.
    lives_near: bool = False
    evicts: bool = False
    # Some records may be pinned near for longer than a step.
    pins: bool = False
    # Moves rows faster than plain operations do; None where there is nothing that does.
    mover: Mover | None = None
    # Uses are sums that grow by little at a time: float32.
    exact_scores: bool = False


class Fetch(NamedTuple):
    """Records asked for: where they are, which are real, and the ticket where they travel."""

    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
    ticket: Ticket | None
    buffer: Tensor | None


class Keep(NamedTuple):
    """Records that stay when a layer is evicted, ascending; the newest `gapless` of them are the newest tokens."""

    positions: Int[Tensor, "B Hkv K"]
    scores: Float32[Tensor, "B Hkv K"]
    gapless: int


class Stored(NamedTuple):
    """What attention reads at one decode step, as it is stored; `positions` are the records' places in the context."""

    rows: Tensor
    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None


class Read(NamedTuple):
    """What attention reads at one decode step; `positions` are the records' places in the context."""

    k: Tensor
    v: Tensor
    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
