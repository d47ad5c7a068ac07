"""Bytes of a context on disk: the pages it needs there, and how many copies of them the host limit leaves room for."""

from __future__ import annotations

from typing import NamedTuple

from farkv.engine.bytes_need import ByteLimits, Held, Need
from farkv.store.far.page_memory import LEAST_PAGES, LEAST_SCRATCH, SCRATCH_PAGES
from farkv.store.far.page_rows import NUMBER_BYTES, PIECE_TOKENS
from farkv.store.ledger import refuse
from farkv.store.sizes import NearNeed


class Cache(NamedTuple):
    """Pages that may have a copy in host memory, and pages that are read from disk at once.

    host_bytes: that all of it takes, with what is there besides.  copies: how many of them others could have instead.
    """

    room: int
    piece: int = SCRATCH_PAGES
    host_bytes: int = 0
    copies: int = 0


def plan_pages(need: Need, held: Held, limits: ByteLimits, near: NearNeed) -> Cache:
    """Refuse a context whose pages the disk cannot hold; give the remaining host memory to page copies.

    Raises:
        CapacityError: with the bytes needed, the limit and the remedy.
    """
    page, pages = limits.page, held.pages
    assert page is not None
    assert pages is not None
    tokens, heads, n_layers = need.n_rows, need.shape.batch * need.shape.kv_heads, len(need.layers)
    row_bytes = page.n_bytes // page.tokens
    n_pages = n_layers * heads * (tokens // page.tokens)
    # Pages of a cropped text are still on disk but no longer part of this one.
    new_bytes = (n_pages - max(pages.n_tabled, pages.n_saved)) * page.n_bytes
    if pages.has_file and limits.disk is not None and new_bytes > max(0, limits.disk - pages.disk_used):
        raise refuse("disk", limits.disk, pages.disk_used + new_bytes, f"the pages of {tokens} tokens")
    # Without a file what follows the saved text stays in host memory.
    saved_tokens = pages.n_saved // (n_layers * heads) * page.tokens
    open_tokens = page.tokens if pages.has_file else max(page.tokens, tokens - saved_tokens)
    fixed = n_layers * heads * (open_tokens * row_bytes + NUMBER_BYTES * (tokens // page.tokens + 1))
    # One layer at a time takes a whole pass before its full pages are written.
    passing = 2 * heads * (need.n_at_once + page.tokens) * row_bytes
    # The gathered rows of a fetch, before they cross the link; of layers that are all read whole a piece, or a block.
    straight = need.assembles and len(need.dense_layers) == n_layers
    gathered = min(near.decode, PIECE_TOKENS * heads * row_bytes) if straight else near.decode
    fixed += passing + gathered + (near.total if limits.near_shares_host else 0)
    if limits.host is None:
        return Cache(max(pages.room, n_pages))
    least = fixed + (LEAST_PAGES + LEAST_SCRATCH) * page.n_bytes
    if least > limits.host:
        raise limits.refuse("host", least, f"the index, buffers and open pages of {tokens} tokens")
    # Copies of several caches share what is left: others keep theirs up to an equal part of it.
    others = limits.host_others
    stay = min(others.copies, (limits.host - least) * others.n_copying // (others.n_copying + 1))
    room = (limits.host - fixed - stay) // page.n_bytes
    # What is read from disk passes through memory of its own.
    piece = min(SCRATCH_PAGES, max(LEAST_SCRATCH, room // 8))
    room = min(max(room - piece, LEAST_PAGES), max(n_pages, LEAST_PAGES))
    return Cache(room, piece, fixed + (room + piece) * page.n_bytes, (room - LEAST_PAGES) * page.n_bytes)
