"""What a near limit leaves over: how many records per layer stay near between fetches, and when they are dropped.

In: the near bytes that a pass needs at its widest. Out: recently used sets of equal size in the layers that fetch, or
none. They never cause a refusal: whatever else needs the memory gets it.
"""

from __future__ import annotations

from typing import NamedTuple

from farkv.engine.bytes_need import ByteLimits, Held, Need
from farkv.engine.bytes_pages import Cache
from farkv.store.far.page_memory import LEAST_PAGES
from farkv.store.near.recently_used import RECORD_BYTES, SLOT_BYTES
from farkv.store.sizes import NearNeed, grow_capacity

# A smaller set costs more metadata than the fetches it saves.
LEAST_SLOTS = 16


class Recent(NamedTuple):
    """What to do with the recently used sets: drop the current ones; make sets of `slots` rows in these layers.

    records: how many records of each layer such a set can find.  pages: page copies that give their room to metadata.
    """

    drops: bool = False
    slots: int = 0
    records: dict[int, int] | None = None
    pages: int = 0


class SetBytes(NamedTuple):
    """Bytes of the recently used sets: near, and in the tier of the records."""

    near: int = 0
    home: int = 0


class _Pass(NamedTuple):
    """A pass whose other bytes are planned: rows of each layer that fetches, near bytes, room for page copies."""

    rows: dict[int, int]
    near: NearNeed
    cache: Cache | None

    @property
    def tokens(self) -> int:
        return max(self.rows.values(), default=0)


def plan_recent(
    need: Need, held: Held, limits: ByteLimits, wide: tuple[dict[int, int], NearNeed, Cache | None], index_grows: bool
) -> tuple[Recent, bool, SetBytes]:
    """Plan the recently used sets; say whether the index may still grow by more than it needs, and what sets take.

    Args:
        wide: rows of each layer, near bytes and page copies, as planned before.
    """
    if limits.near is None or not limits.is_far or limits.pins:
        return Recent(), index_grows, SetBytes()
    # They take the room of no other cache's.
    home = None if limits.home is None else limits.home - limits.host_others.copies
    limits = limits._replace(near=limits.near - limits.near_others.copies, home=home)
    assert limits.near is not None
    now = _Pass({i: n for i, n in wide[0].items() if i not in need.dense_layers}, wide[1], wide[2])
    recent, near_bytes = Recent(), 0
    if held.sets is not None:
        pages = count_pages(now.cache, limits, held.sets.metadata_bytes)
        stays = fits_near(need, held, limits.near, now) and fits_host(held, limits, now.rows) and pages is not None
        recent = Recent(pages=pages or 0) if stays else Recent(drops=True)
        near_bytes = held.sets.near_bytes if stays else 0
    if (held.sets is None or recent.drops) and need.decodes and now.tokens and fits_host(held, limits, now.rows):
        recent, near_bytes = make_sets(need, held, limits, now)
    if near_bytes:
        grown = now.near.index * grow_capacity(0, now.tokens) // now.tokens
        index_grows = index_grows and now.near.total - now.near.index + grown + near_bytes <= limits.near
    # Over a disk page copies have given their room.
    metadata = count_metadata(need, held, recent) if near_bytes and limits.page is None else 0
    return recent, index_grows, SetBytes(near_bytes, metadata)


def count_metadata(need: Need, held: Held, recent: Recent) -> int:
    """Return the bytes of what finds the copies, of sets that stay or are made."""
    if recent.records is None:
        return 0 if held.sets is None else held.sets.metadata_bytes
    heads = need.shape.batch * need.shape.kv_heads
    return heads * (sum(recent.records.values()) * RECORD_BYTES + len(recent.records) * recent.slots * SLOT_BYTES)


def count_excess(held: Held, near: NearNeed) -> int:
    """Return the near bytes that were taken for a longer context than there is now."""
    others = held.near_used - held.index_used - (held.sets.near_bytes if held.sets else 0)
    return max(0, held.index_used - near.index) + max(0, others - (near.total - near.index))


def fits_near(need: Need, held: Held, limit: int, now: _Pass) -> bool:
    """Say whether the sets are of this batch, go as far as the pool will, and leave a pass what it needs."""
    sets = held.sets
    assert sets is not None
    known = sets.batch == need.shape.batch and all(sets.records.get(i, -1) >= n for i, n in now.rows.items())
    return known and now.near.total + count_excess(held, now.near) + sets.near_bytes <= limit


def fits_host(held: Held, limits: ByteLimits, rows: dict[int, int]) -> bool:
    """Say whether the pool's limit, if there is one, has room for metadata: not while a layer must still grow."""
    if limits.home is None or limits.page is not None:
        return True
    return held.metadata_has_room and all(held.capacity[layer] >= n for layer, n in rows.items())


def count_pages(cache: Cache | None, limits: ByteLimits, metadata_bytes: int) -> int | None:
    """Return how many page copies must go for so much metadata; None where too few would be left."""
    if cache is None or limits.host is None:
        return 0
    assert limits.page is not None
    n_pages = -(-metadata_bytes // limits.page.n_bytes)
    # Of what copies may have, at most a quarter.
    return None if cache.room - n_pages < LEAST_PAGES or 4 * n_pages > cache.room else n_pages


def make_sets(need: Need, held: Held, limits: ByteLimits, now: _Pass) -> tuple[Recent, int]:
    """Make sets from what is left of the near limit if they are large enough to pay; return their near bytes too."""
    assert limits.near is not None
    drops, near, heads = held.sets is not None, now.near, need.shape.batch * need.shape.kv_heads
    records = {layer: n if need.is_announced else grow_capacity(0, n) for layer, n in now.rows.items()}
    # What grows finds room beside them until they are made anew; the index grows by a quarter even then.
    widest = max(records.values())
    index = near.index * (widest if need.is_announced else grow_capacity(0, widest)) // now.tokens
    wide = index + (near.total - near.index) * widest // now.tokens + 2
    spare = limits.near - wide - count_excess(held, near)
    slots = min(spare // (len(records) * heads * need.stored_bytes), widest)
    if slots < LEAST_SLOTS:
        return Recent(drops), 0
    metadata_bytes = count_metadata(need, held, Recent(slots=slots, records=records))
    near_bytes = len(records) * slots * heads * need.stored_bytes
    near_used = held.near_used - (held.sets.near_bytes if held.sets else 0)
    pages = count_pages(now.cache, limits, metadata_bytes)
    if near_used + near_bytes > limits.near or pages is None:
        return Recent(drops), 0
    home_used = held.home_used - (held.sets.metadata_bytes if held.sets else 0) - count_freed(held, limits, now, pages)
    if limits.home is not None and home_used + metadata_bytes > limits.home:
        return Recent(drops, pages=pages), 0
    return Recent(drops, slots, records, pages), near_bytes


def count_freed(held: Held, limits: ByteLimits, now: _Pass, pages: int) -> int:
    """Return the host bytes of page copies that the plan drops."""
    if now.cache is None or held.pages is None or limits.page is None:
        return 0
    n_copies = max(0, held.pages.used - (now.cache.room - pages))
    scratch = held.pages.scratch if held.pages.scratch > now.cache.piece else 0
    return (n_copies + scratch) * limits.page.n_bytes
