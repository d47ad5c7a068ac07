"""What a near limit leaves: how many records of every layer may stay near between fetches, and when they must go.

In: the near bytes that a pass needs at its widest. Out: hot sets of equal size in the layers that fetch, or none. They
never cause a refusal: whatever else needs the memory gets it.
"""

from __future__ import annotations

from typing import NamedTuple

from farkv.store.far.page_cache import LEAST_PAGES
from farkv.store.near.recently_used import RECORD_BYTES, SLOT_BYTES, RecentlyUsed, RecentSize
from farkv.store.sizes import LayerShape, NearNeed, grow_capacity
from farkv.store.tiers import Store

# A smaller hot set is not worth its books.
LEAST_SLOTS = 16


class Pass(NamedTuple):
    """A pass that was admitted: rows of each layer that fetches, and near bytes, at its widest.

    announced: these are the widest of the whole context.  decodes: it is a decode step.
    """

    shape: LayerShape
    rows: dict[int, int]
    need: NearNeed
    announced: bool
    decodes: bool

    @property
    def tokens(self) -> int:
        """Return the rows of the widest layer."""
        return max(self.rows.values(), default=0)


def admit_hot(store: Store, now: Pass) -> None:
    """Free hot sets that a pass leaves no room for; before a decode step make them where there is room."""
    if store.near.limit is None or not store.far or store.pins:
        return
    books = sum(hot.size.metadata_bytes for hot in store.recently_used.values())
    if store.recently_used and not (fits_near(store, now) and fits_host(store, now.rows) and take_pages(store, books)):
        store.drop_recently_used()
    if not store.recently_used and now.decodes and now.tokens and fits_host(store, now.rows):
        make_hot(store, now)
    if store.recently_used:
        grown = now.need.index * grow_capacity(0, now.tokens) // now.tokens
        wide = now.need.total - now.need.index + grown + count_near(store)
        store.index.roomy = store.index.roomy and wide <= store.near.limit


def count_near(store: Store) -> int:
    """Return the near bytes of all hot sets."""
    return sum(hot.rows.n_bytes for hot in store.recently_used.values())


def count_excess(store: Store, need: NearNeed) -> int:
    """Return the near bytes that were taken for a longer context than there is now."""
    index, others = store.index.used, store.near.used - store.index.used - count_near(store)
    return max(0, index - need.index) + max(0, others - (need.total - need.index))


def fits_near(store: Store, now: Pass) -> bool:
    """Say whether the hot sets are of this batch, go as far as the pool will, and leave a pass what it needs."""
    assert store.near.limit is not None
    sizes = {layer: hot.size for layer, hot in store.recently_used.items()}
    known = all(i in sizes and sizes[i].records >= n and sizes[i].batch == now.shape.batch for i, n in now.rows.items())
    return known and now.need.total + count_excess(store, now.need) + count_near(store) <= store.near.limit


def fits_host(store: Store, rows: dict[int, int]) -> bool:
    """Say whether the pool's limit, if there is one, has room for books: not while a layer must still grow."""
    if store.home.limit is None or store.page_cache is not None:
        return True
    books = [part for kept in store.kept.values() for part in (kept.places, kept.scores)]
    return all(store.pool[layer].capacity >= n for layer, n in rows.items()) and all(
        part.capacity > part.length for part in [*books, *store.shadow.values()]
    )


def take_pages(store: Store, metadata_bytes: int) -> bool:
    """Take the room of the books from copies of pages; say whether they have enough besides."""
    frames = store.page_cache
    if frames is None or store.host.limit is None:
        return True
    # Of what copies may have, at most a quarter.
    n_pages = -(-metadata_bytes // frames.pages.form.n_bytes)
    if frames.room - n_pages < LEAST_PAGES or 4 * n_pages > frames.room:
        return False
    frames.resize(frames.room - n_pages, frames.piece)
    return True


def make_hot(store: Store, now: Pass) -> None:
    """Make hot sets of what is left of the near limit, if that is worth it."""
    assert store.near.limit is not None
    shape, need, heads = now.shape, now.need, now.shape.batch * now.shape.kv_heads
    records = {layer: n if now.announced else grow_capacity(0, n) for layer, n in now.rows.items()}
    # What grows finds room beside them until they are made anew; the index grows by a quarter even then.
    widest = max(records.values())
    index = need.index * (widest if now.announced else grow_capacity(0, widest)) // now.tokens
    wide = index + (need.total - need.index) * widest // now.tokens + 2
    spare = store.near.limit - wide - count_excess(store, need)
    slots = min(spare // (len(records) * heads * store.stored_bytes(shape)), widest)
    if slots < LEAST_SLOTS:
        return
    metadata_bytes = heads * (sum(records.values()) * RECORD_BYTES + len(records) * slots * SLOT_BYTES)
    near_bytes = len(records) * slots * heads * store.stored_bytes(shape)
    if not (store.near.has_room(near_bytes) and take_pages(store, metadata_bytes) and store.home.has_room(metadata_bytes)):
        return
    for layer, n in records.items():
        pool = store.pool[layer]
        size = RecentSize(shape.batch, shape.kv_heads, slots, n, pool.width, pool.dtype)
        store.recently_used[layer] = RecentlyUsed(store.near, store.device, store.home, size)
