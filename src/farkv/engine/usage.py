"""What a cache takes and holds, as its receipt asks for it. In: an engine. Out: numbers."""

from __future__ import annotations

from typing import NamedTuple

from farkv.account import INEXACT
from farkv.engine.step import Engine
from farkv.store.placement import Placement


class Usage(NamedTuple):
    """Byte peaks of a cache's tiers, and how its records are stored.

    near_records: bytes at the peak, without the index.  quant: how records are stored, None as they came.
    """

    near_records: int
    index_bytes: int
    host: int
    disk: int
    quant: str | None
    on_disk: bool
    max_error: float


class Holding(NamedTuple):
    """Records of one layer, all sequences and KV heads: held now, and evicted; bytes of one."""

    kept: int
    evicted: int
    record_bytes: int


def count_usage(engine: Engine) -> Usage:
    """Return the byte peaks of all tiers."""
    store = engine.store
    index = store.index.peak
    # Where the pool is near memory and has no limit of its own, its peak is the host's, which the index is part of.
    near = (store.host if store.placement is Placement.IN_PLACE else store.near).peak - index
    return Usage(
        near, index, store.host.peak, store.disk_bytes, store.limits.quant, store.placement is Placement.DISK,
        store.max_error,
    )  # fmt: skip


def count_holding(engine: Engine, layer: int) -> Holding:
    """Return what is held and what was evicted of a layer."""
    store = engine.store
    # Zeros where an exception stopped a prompt that was passing by.
    batch, heads = store.heads(layer)
    n = batch * heads
    return Holding(n * store.length(layer), n * store.evicted[layer], engine.account.record_bytes.get(layer, 0))


def find_exact(engine: Engine) -> str:
    """Return how near all passes so far came to the plain model: the worst of `EXACT`."""
    store = engine.store
    if store.codecs or any(store.evicted.values()):
        # No pass has read what is left, or what it was coded to, yet: the next one will.
        return INEXACT
    return engine.account.exact
