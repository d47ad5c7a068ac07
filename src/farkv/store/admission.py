"""Refuse what some limit cannot hold, before any layer is touched.

In: the rows and near bytes that a pass will need. Out: nothing, or a CapacityError with the bytes and the remedy.
"""

from __future__ import annotations

import gc

from farkv.store.far.page_cache import LEAST_PAGES, LEAST_SCRATCH, SCRATCH_PAGES
from farkv.store.far.page_rows import NUMBER_BYTES, PagedRows
from farkv.store.ledger import Ledger
from farkv.store.near.buffers import SLOT_BYTES
from farkv.store.sizes import LayerShape, NearNeed, grow_capacity
from farkv.store.tiers import Store


def admit(
    store: Store, shape: LayerShape, rows: dict[int, int], need: NearNeed, *, n_new: int = 0, besides: int = 0
) -> None:
    """Refuse, before any layer is touched, what some limit cannot hold.

    Args:
        shape: of every managed layer.
        rows: rows that each layer holds when this forward pass, or the reserved context, is at its widest.
        need: near bytes of this pass at its widest moment; ignored where the pool is near memory.
        n_new: tokens of this pass.
        besides: bytes that are counted with the records, for verification or while a layer is evicted.

    Raises:
        CapacityError: with the bytes needed, the limit and the remedy.
    """
    total = max(rows.values(), default=0)
    if store.page_cache is not None:
        admit_pages(store, shape, (total, n_new), need)
    else:
        admit_rows(store, shape, rows, need, besides)
    if store.far:
        # What grows by more than it needs would take the room of what comes after it.
        store.near.roomy = all(ledger is None or ledger.limit is None for ledger in (store.near, store.near.parent))
        store.index.roomy = store.near.roomy
    if store.far and store.near.limit is not None:
        if need.total > store.near.limit:
            parts = ", ".join(f"{name} {size:,}" for name, size in need._asdict().items())
            raise store.near.refuse(need.total - store.near.used, f"a context of {total} tokens ({parts})")
        room = grow_capacity(0, total)
        store.index.roomy = need.total + need.index * (room - total) // total <= store.near.limit


def admit_rows(store: Store, shape: LayerShape, rows: dict[int, int], need: NearNeed, besides: int) -> None:
    """Refuse records that the host pool, or near memory as their home, cannot hold."""
    total = max(rows.values(), default=0)
    row_bytes = store.metadata_bytes + (SLOT_BYTES if store.pins else 0)
    token_bytes = (store.stored_bytes(shape) + row_bytes) * shape.batch * shape.kv_heads
    if store.near.parent is not None:
        besides += need.total
    grow = [layer for layer, n in rows.items() if store.pool[layer].capacity < n]
    if store.home.limit is not None and (grow or store.shadow):
        held = {layer: count_held(store, layer) for layer in rows}
        # While a layer grows, its old rows are still there.
        kept = sum(n for layer, n in held.items() if layer not in grow) + max(
            (held[layer] for layer in grow), default=0
        )
        end = kept + besides + sum(rows[layer] for layer in grow) * token_bytes
        if end > store.home.limit:
            raise store.home.refuse(end - store.home.used, f"the KV of {total} tokens")
        room = sum(grow_capacity(0, rows[layer]) for layer in grow)
        # What is remembered to verify against grows too.
        spare = besides // 4 + 64 * len(rows) * token_bytes if store.shadow else 0
        store.home.roomy = kept + besides + spare + room * token_bytes <= store.home.limit


def admit_pages(store: Store, shape: LayerShape, size: tuple[int, int], need: NearNeed) -> None:
    """Refuse a context whose pages the disk cannot hold, and let page copies have what host memory is left.

    Args:
        size: tokens of the context, and of this pass.
    """
    tokens, n_new = size
    frames, n_layers, heads = store.page_cache, len(store.pool), shape.batch * shape.kv_heads
    assert frames is not None
    form, file = frames.pages.form, frames.pages.file
    row_bytes = form.n_bytes // form.tokens
    n_pages = n_layers * heads * (tokens // form.tokens)
    if file is not None and store.limits.disk is not None:
        # Pages of a text that was taken back are on disk still, and are no part of this one.
        held = sum(heads * rows.table.length for rows in store.pool.values() if isinstance(rows, PagedRows))
        admit_disk(store.limits.disk.ledger, (n_pages - max(held, frames.pages.n_saved)) * form.n_bytes, tokens)
    # Without a file what follows the saved text stays in host memory.
    open_tokens = form.tokens if file is not None else max(form.tokens, tokens - saved_tokens(store, heads))
    fixed = n_layers * heads * (open_tokens * row_bytes + NUMBER_BYTES * (tokens // form.tokens + 1))
    # One layer at a time takes a whole pass before its full pages are written.
    passing = 2 * heads * (n_new + form.tokens) * row_bytes
    # The gathered rows of a fetch, before they cross the link.
    fixed += passing + need.decode + (need.total if store.near.parent is not None else 0)
    store.host.roomy = store.host.limit is None
    if store.host.limit is None:
        frames.resize(max(frames.room, n_pages))
        return
    room = (store.host.limit - fixed) // form.n_bytes
    # What is read from disk passes through memory of its own.
    piece = min(SCRATCH_PAGES, max(LEAST_SCRATCH, room // 8))
    room -= piece
    if room < LEAST_PAGES:
        least = fixed + (LEAST_PAGES + LEAST_SCRATCH) * form.n_bytes
        raise store.host.refuse(least - store.host.used, f"the index, buffers and open pages of {tokens} tokens")
    frames.resize(min(room, max(n_pages, LEAST_PAGES)), piece)


def admit_disk(ledger: Ledger, n_bytes: int, tokens: int) -> None:
    """Refuse pages that the disk cannot hold."""
    if n_bytes > 0 and not ledger.has_room(n_bytes):
        # A cache that was dropped may still wait for the collector, with its file.
        gc.collect()
        if not ledger.has_room(n_bytes):
            raise ledger.refuse(n_bytes, f"the pages of {tokens} tokens")


def saved_tokens(store: Store, heads: int) -> int:
    """Return the tokens of the saved text that are in full pages."""
    assert store.page_cache is not None
    form = store.page_cache.pages.form
    return store.page_cache.pages.n_saved // (len(store.pool) * heads) * form.tokens


def count_held(store: Store, layer: int) -> int:
    """Return the bytes that a layer's records and their books take now."""
    kept, held = store.kept.get(layer), store.pinned.get(layer)
    books = kept.places.n_bytes + kept.scores.n_bytes if kept else 0
    return store.pool[layer].n_bytes + books + (held.slots.n_bytes if held else 0)
