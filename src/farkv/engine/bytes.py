"""All admission of one cache as one pure function: what a pass needs, what is held, what is allowed -> a `BytePlan`.

In: numbers. Out: a plan that keeps to every limit, or a CapacityError with the bytes, the limit and the remedy. Nothing
is allocated or changed here; `engine.admit` takes the numbers from the store and applies the plan to it.

near   index + window + pinned + max(a prefill pass, a decode step) <= near limit    (`engine.bytes_near`)
host   rows of all layers, with what is counted beside them         <= host limit
host   open pages + page tables + page copies + buffers             <= host limit    (over a disk: `engine.bytes_pages`)
disk   full pages                                                   <= disk limit
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from typing import NamedTuple

from farkv.engine.bytes_near import LEAST_BLOCK, Near, plan_near
from farkv.engine.bytes_need import ByteLimits, Held, Need, PoolNeed
from farkv.engine.bytes_pages import Cache, plan_pages
from farkv.engine.bytes_recent import Recent, count_excess, plan_recent
from farkv.engine.pool_policy import USE_BYTES
from farkv.errors import CapacityError
from farkv.store.sizes import NearNeed, grow_capacity


class Tier(NamedTuple):
    """Bytes of one tier, and how many of them are only for copies."""

    total: int = 0
    copies: int = 0


class BytePlan(NamedTuple):
    """What a pass may take, at its widest moment and at that of the announced context.

    rows: that each layer will hold.  reserve: rows of every layer's first allocation, where that is known to be less
    than the context.  pool_rows: rows that a pool which evicts has room for; 0: it evicts nothing.  chunk_tokens:
    tokens of an announced prompt that are read at once.  remember_tokens: records to keep besides, to verify against.
    near: near bytes, and whether dense reads come in blocks.  cache: room for page copies, over a disk.  recent: the
    recently used sets.  home_grows, near_grows, index_grows: rows that grow may take more than they need.  near_bytes,
    host_bytes: all that the pass may come to, of each limited tier; and of that, what is only copies.
    """

    rows: dict[int, int]
    reserve: dict[int, int] | None
    pool_rows: int
    chunk_tokens: int
    remember_tokens: int
    near: Near
    cache: Cache | None
    recent: Recent
    home_grows: bool
    near_grows: bool
    index_grows: bool
    near_bytes: Tier = Tier()
    host_bytes: Tier = Tier()


class _Rows(NamedTuple):
    """Rows that each layer holds at its widest, and what is counted with them."""

    rows: dict[int, int]
    besides: int
    reserve: dict[int, int] | None
    pool_rows: int
    remember_tokens: int


def plan_bytes(need: Need, held: Held, limits: ByteLimits) -> BytePlan:
    """Plan a pass, or refuse it.

    An announced prompt is planned with passes of `need.chunk` tokens, and with smaller ones where those do not fit and
    the limit asks for blocks: only what is read in blocks needs less memory when it is read in smaller passes.

    Raises:
        CapacityError: a limit cannot hold the pass.

    Cost: some hundred integer operations per layer.
    """
    chunk = need.chunk
    while True:
        now = need._replace(chunk=chunk)
        if now.assembles:
            # What whole layers have no room for may still be read in blocks.
            with suppress(CapacityError):
                return _plan_pass(now, held, limits)
            now = now._replace(assembles=False)
        try:
            return _plan_pass(now, held, limits)
        except CapacityError:
            if chunk <= LEAST_BLOCK or not plan_near(now, limits, need.tokens).streams:
                raise
            chunk //= 2


def _plan_pass(need: Need, held: Held, limits: ByteLimits) -> BytePlan:
    wide = _count_rows(need, held, limits)
    n_rows = need.tokens if need.pool is None else max(wide.rows.values())
    near = plan_near(need, limits, n_rows)
    cache, home_grows, home_bytes = None, True, 0
    if limits.page is not None:
        near, cache = _plan_paged(need, held, limits, near)
        home_grows, home_bytes = limits.host is None, cache.host_bytes
    else:
        home_grows, home_bytes = _plan_rows(need, held, limits, wide, near.need)
    near_grows, index_grows, spare = _plan_growth(limits, wide.rows, near.need, home_bytes)
    recent, index_grows, set_bytes = plan_recent(need, held, limits, (wide.rows, near.need, cache), index_grows)
    # What was announced is allocated at once.
    spare = spare if index_grows and not need.is_announced else 0
    near_bytes = near.need.total + spare + count_excess(held, near.need) + set_bytes.near
    host_bytes = home_bytes + (spare if limits.near_shares_host else 0) + set_bytes.home
    lives_near = limits.home_name == "near"
    # What was taken for a longer context may go before the rest comes: in no case more than there is.
    near_bytes, host_bytes = min(near_bytes, limits.near or 0), min(host_bytes, limits.host or 0)
    return BytePlan(
        wide.rows, wide.reserve, wide.pool_rows, need.chunk, wide.remember_tokens, near, cache, recent,
        home_grows, near_grows, index_grows,
        Tier(home_bytes) if lives_near else Tier(near_bytes, set_bytes.near),
        Tier() if lives_near else Tier(host_bytes, 0 if cache is None else cache.copies),
    )  # fmt: skip


def _plan_growth(limits: ByteLimits, rows: dict[int, int], near: NearNeed, home_bytes: int) -> tuple[bool, bool, int]:
    """Say whether near rows and the index may grow by more than they need, and by how many bytes the index does then.

    What grows by more than it needs would take the room of what comes after it.

    Raises:
        CapacityError: near memory cannot hold even what is needed.
    """
    total = max(rows.values(), default=0)
    spare = near.index * (grow_capacity(0, total) - total) // total if total else 0
    if limits.near_shares_host:
        grows = limits.host is None or (limits.page is None and home_bytes + spare <= limits.host)
        return limits.host is None, grows, spare
    if not limits.is_far or limits.near is None:
        return True, True, spare
    _check_near(near, limits, total)
    return False, near.total + spare <= limits.near, spare


def _count_rows(need: Need, held: Held, limits: ByteLimits) -> _Rows:
    rows, besides, reserve, pool_rows = dict.fromkeys(need.layers, need.n_rows), 0, None, 0
    if need.keep is not None:
        rows, besides = need.keep.rows, need.keep.besides
        reserve = rows if max(rows.values()) < need.tokens else None
    remember_tokens = 0
    if need.remembers:
        # One layer more while what is remembered grows.
        remember_tokens = need.tokens
        n_layers = len(need.layers) + (0 if need.is_announced else 1)
        besides += n_layers * need.tokens * need.shape.token_bytes
    if need.pool is not None:
        rows, pool_rows = _fit_pool(need, need.pool, limits, besides)
        reserve = rows
    return _Rows(rows, besides, reserve, pool_rows, remember_tokens)


def _fit_pool(need: Need, pool: PoolNeed, limits: ByteLimits, besides: int) -> tuple[dict[int, int], int]:
    """Return the rows that every layer holds at the widest moment, for a pool that evicts, and its rows when full."""
    assert limits.home is not None
    if not need.is_announced:
        # Of a context of any length a step may come to read all rows that there is room for.
        need = need._replace(read_rows=lambda n: n)
    # An announced prompt is read in passes that fit.
    at_once = 1 if need.chunk else need.n_at_once
    pinned = pool.sinks + pool.recent
    least = max(at_once + min(pool.length, pinned), min(need.tokens, 1 + pinned))
    capacity = pool.capacity or _count_capacity(need, pool, limits, besides)
    if least > capacity:
        purpose = f"{at_once} tokens read at once (fewer: generate(prefill_chunk_size=...))"
        needed = _count_home(need, pool, limits, besides, least)
        if needed <= limits.home and limits.is_far and limits.near is not None:
            _check_near(plan_near(need, limits, least).need, limits, least)
        raise limits.refuse(limits.home_name, max(needed, limits.home + 1), purpose)
    rows = min(need.tokens, capacity)
    if grow_capacity(0, rows) > capacity:
        # A layer that grows with room to spare must not take what the others will need.
        rows = capacity
    return dict.fromkeys(need.layers, rows), capacity


def _count_capacity(need: Need, pool: PoolNeed, limits: ByteLimits, besides: int) -> int:
    """Return the most rows per layer and KV head that every limit has room for."""
    home, near = limits.home, limits.near if limits.is_far else None
    assert home is not None

    def is_too_much(n: int) -> bool:
        if _count_home(need, pool, limits, besides, n) > home:
            return True
        return near is not None and plan_near(need, limits, n).need.total > near

    return bisect_left(range(1, home + 1), True, key=is_too_much)


def _count_home(need: Need, pool: PoolNeed, limits: ByteLimits, besides: int, n_rows: int) -> int:
    """Return the bytes in the tier of a pool that evicts, where every layer holds `n_rows` rows."""
    # While a layer grows, its old rows are still there; what was announced is allocated at once.
    n_layers = len(need.layers) + (0 if n_rows <= need.reserve_tokens else 1)
    near_bytes, row_bytes = 0, pool.row_bytes
    if limits.near_shares_host:
        # Uses are among the near bytes.
        near_bytes, row_bytes = plan_near(need, limits, n_rows).need.total, row_bytes - USE_BYTES
    return n_layers * n_rows * row_bytes * need.shape.batch * need.shape.kv_heads + besides + near_bytes


def _plan_paged(need: Need, held: Held, limits: ByteLimits, near: Near) -> tuple[Near, Cache]:
    """Plan pages; with the smallest blocks of a dense read if host memory has no room for those that near memory has.

    What is read from pages is gathered in host memory first.
    """
    try:
        return near, plan_pages(need, held, limits, near.need)
    except CapacityError:
        least = plan_near(need, limits, need.tokens, LEAST_BLOCK)
        return least, plan_pages(need, held, limits, least.need)


def _plan_rows(need: Need, held: Held, limits: ByteLimits, wide: _Rows, near: NearNeed) -> tuple[bool, int]:
    """Refuse rows that the host pool, or near memory as their home, cannot hold.

    Returns:
        Whether they may grow freely, and the bytes of that tier at the widest.
    """
    rows, besides = wide.rows, wide.besides
    token_bytes = (need.stored_bytes + need.row_bytes) * need.shape.batch * need.shape.kv_heads
    if limits.near_shares_host:
        besides += near.total
    grow = [layer for layer, n in rows.items() if held.capacity[layer] < n]
    remembers = wide.remember_tokens > 0 or held.remembers
    if limits.home is None:
        return held.home_grows, 0
    # While a layer grows, its old rows are still there.
    kept = sum(n for layer, n in held.layer_bytes.items() if layer not in grow)
    kept += max((held.layer_bytes[layer] for layer in grow), default=0)
    end = kept + besides + sum(rows[layer] for layer in grow) * token_bytes
    if end > limits.home:
        raise limits.refuse(limits.home_name, end, f"the KV of {max(rows.values(), default=0)} tokens")
    if not (grow or remembers):
        return held.home_grows, end
    room = sum(grow_capacity(0, rows[layer]) for layer in grow)
    # What is remembered to verify against grows too.
    spare = besides // 4 + 64 * len(rows) * token_bytes if remembers else 0
    wanted = kept + besides + spare + room * token_bytes
    # What was announced is allocated as it is, all at once.
    takes_more = wanted <= limits.home and not need.is_announced
    return wanted <= limits.home, wanted if takes_more else end


def _check_near(need: NearNeed, limits: ByteLimits, tokens: int) -> None:
    assert limits.near is not None
    if need.total > limits.near:
        parts = ", ".join(f"{name} {n:,}" for name, n in need._asdict().items())
        raise limits.refuse("near", need.total, f"a context of {tokens} tokens ({parts})")
