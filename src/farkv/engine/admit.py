"""Takes the numbers of a pass to `plan_bytes`, and applies its plan to the store: once, before any layer is touched."""

from __future__ import annotations

import gc

from farkv.engine.budget import Budgets
from farkv.engine.bytes import BytePlan, plan_bytes
from farkv.engine.bytes_need import ByteLimits, Held, Need, PagesHeld, PageSize, PoolNeed, SetsHeld
from farkv.engine.mode import Mode
from farkv.engine.pool_policy import USE_BYTES, PoolPolicy
from farkv.engine.shares import Shares
from farkv.errors import CapacityError
from farkv.methods.base import Selector
from farkv.store.far.kept import ROW_BYTES
from farkv.store.far.page_memory import LEAST_PAGES
from farkv.store.far.page_rows import PagedRows
from farkv.store.memory import return_freed
from farkv.store.near.pinned import SLOT_BYTES as PIN_BYTES
from farkv.store.near.recently_used import RecentlyUsed, RecentSize
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Store


class Admission:
    """The admission of one cache.

    Args:
        verifies: steps will be compared with dense passes, which need near memory beside the buffers.
        n_groups, expands: see `Need`.
    """

    def __init__(
        self,
        selector: Selector,
        budgets: Budgets,
        mode: Mode,
        *,
        shares: Shares | None,
        pins: dict[int, float] | None,
        policy: PoolPolicy | None,
        verifies: bool,
        n_groups: int = 1,
        expands: bool = False,
    ):
        self.selector, self.budgets, self.shares, self.pins, self.policy = selector, budgets, shares, pins, policy
        self.store: Store = budgets.store
        self.layers = list(self.store.order)
        self.mode, self.verifies, self.n_groups, self.expands = mode, verifies, n_groups, expands
        # Tokens of an announced prompt that are read at once; 0: nothing was announced.
        self.chunk_tokens = 0
        self._admitted: tuple[object, ...] = ()
        # Passes that still begin with freed memory given back: a prompt leaves some, and the first step, which fits.
        self._n_to_trim = 0

    def admit(self, shape: LayerShape, n_new: int, chunk: int = 0) -> None:
        """Refuse tokens that a limit cannot hold, before any layer is touched, and make room for those that fit.

        Args:
            chunk: tokens that may be read at once, where `n_new` are announced and not yet there; what fits is found.

        Raises:
            CapacityError: with the bytes needed, the limit and the remedy; nothing has changed.
        """
        store, reserve = self.store, self.store.limits.reserve_tokens
        if self._n_to_trim and self._is_limited():
            return_freed()
        self._n_to_trim = 2 if n_new > 1 and not chunk else max(0, self._n_to_trim - 1)
        tokens = max(store.seen(self.layers[0]) + n_new, reserve)
        n_rows = max(store.length(self.layers[0]) + n_new, reserve)
        # A pass that reads everything takes what a prompt's passes take, however few tokens it has.
        asked = (shape, tokens, n_rows, max(n_new, 2) if self.mode.reads_all else n_new, chunk)
        # By this very store: what a copied cache was promised is the other one's.
        is_known = (id(store), *asked) == self._admitted and not self._has_others()
        if not self._always_asks() and (not self._is_limited() or is_known):
            # Nothing is limited, or the same was admitted before, at step after announced step.
            self.chunk_tokens = chunk or self.chunk_tokens
            return
        with store.shared.admitting:
            need, limits = self._count_need(*asked), self._take_limits()
            try:
                plan = plan_bytes(need, self._take_held(), limits)
            except CapacityError:
                if limits.disk is None and not (limits.near_others.held or limits.host_others.held):
                    raise
                # A cache that was dropped may still wait for the collector, with its file.
                gc.collect()
                plan = plan_bytes(need, self._take_held(), self._take_limits())
            self._claim(plan)
            self._apply(plan, shape)
        self._admitted = (id(store), *asked)

    def fit_chunk(self, n_tokens: int) -> int:
        """Return how many tokens of a prompt to read at once, at most `n_tokens`: what the limits have room for."""
        n_tokens = min(n_tokens, self.chunk_tokens) if self.chunk_tokens else n_tokens
        if self.policy is None or not self.policy.capacity:
            return n_tokens
        capacity, pinned = self.policy.capacity, self.policy.sinks + self.policy.recent
        return min(n_tokens, max(1, min(capacity // 4, capacity - pinned)))

    def count_join(self, shape: LayerShape, tokens: int) -> tuple[Need, ByteLimits]:
        """Return what a joined batch of `tokens` needs at its next step, and what is allowed."""
        return self._count_need(shape, tokens, tokens, 1, 0), self._take_limits()

    def rest(self) -> None:
        """Between passes count on no more than is held: what a pass needs for a moment, another cache's may have."""
        store = self.store
        for ledger in (store.near, store.host):
            if ledger.parent is not None and ledger.parent.is_shared:
                ledger.promise(0, count_copies(store, ledger.tier))

    def ask_again(self) -> None:
        """Plan the next pass anew, whatever was admitted: a pass was taken back."""
        self._admitted = ()

    def forget(self) -> None:
        """Forget what was announced: the cache is empty, and other caches may have its bytes."""
        self._admitted = ()
        for ledger in (self.store.near, self.store.host):
            ledger.promise(0)

    def _is_limited(self) -> bool:
        limits = self.store.limits
        return self.store.is_far or limits.host is not None or limits.near is not None

    def _has_others(self) -> bool:
        """Say whether other caches of the handle hold bytes under its limits."""
        pair = ((each.parent, each.counted) for each in (self.store.near, self.store.host))
        return any(whole is not None and whole.is_shared and whole.used > own for whole, own in pair)

    def _always_asks(self) -> bool:
        """Say whether what is held changes from step to step in other ways than by new tokens."""
        levers = (self.shares, self.policy, self.pins)
        return not self.store.reads_in_place or any(lever is not None for lever in levers)

    # --- numbers --------------------------------------------------------------------------------------------

    def _count_need(self, shape: LayerShape, tokens: int, n_rows: int, n_new: int, chunk: int) -> Need:
        store = self.store
        stored, pins = store.stored_bytes(shape), self.pins
        return Need(
            shape=shape,
            layers=self.layers,
            tokens=tokens,
            n_rows=n_rows,
            n_new=n_new,
            chunk=chunk,
            reserve_tokens=store.limits.reserve_tokens,
            stored_bytes=stored,
            row_bytes=store.metadata_bytes + (PIN_BYTES if store.pins else 0),
            window=store.window,
            dense_layers=frozenset(i for i in self.layers if self.selector.reads_all(i)),
            index_bytes=lambda n: self.selector.index_bytes(shape, n),
            read_rows=lambda n: max(self.budgets.count_most(n, i) for i in self.layers),
            pinned_bytes=lambda n: 0 if pins is None else sum(int(s * n) for s in pins.values()) * shape.token_bytes,
            is_coded=store.limits.quant is not None,
            evicts=bool(store.kept),
            verifies=self.verifies,
            decodes=n_new == 1 and not chunk and store.length(self.layers[0]) > 0,
            keep=None if self.shares is None else self.shares.plan(shape, tokens, n_new, self.mode.prompt_tokens),
            pool=None if self.policy is None else self._count_pool(self.policy, stored),
            # A pool that evicts has better use for the room.
            n_groups=self.n_groups,
            expands=self.expands,
            assembles=self.policy is None and all(self.budgets.count(tokens, i) >= tokens for i in self.layers),
        )

    def _count_pool(self, policy: PoolPolicy, stored_bytes: int) -> PoolNeed:
        row_bytes = stored_bytes + ROW_BYTES + USE_BYTES
        return PoolNeed(policy.sinks, policy.recent, row_bytes, self.store.length(self.layers[0]), policy.capacity)

    def _take_limits(self) -> ByteLimits:
        store = self.store
        cache, disk, shared = store.page_cache, store.limits.disk, store.shared
        form = None if cache is None else cache.pages.form
        others = {tier: shared.count_others(store, tier) for tier in ("near", "host")}
        left = {
            ledger.tier: None if ledger.limit is None else ledger.limit - others[ledger.tier].held
            for ledger in (store.near, store.host)
        }
        return ByteLimits(
            near=left["near"],
            host=left["host"],
            home=left[store.home.tier],
            home_name=store.home.tier,
            is_far=store.is_far,
            near_shares_host=store.shares_host,
            pins=store.pins,
            page=None if form is None else PageSize(form.tokens, form.n_bytes),
            disk=None if disk is None else disk.ledger.limit,
            near_others=others["near"],
            host_others=others["host"],
        )

    def _take_held(self) -> Held:
        store = self.store
        metadata = [part for kept in store.kept.values() for part in (kept.places, kept.scores)]
        sets = store.recently_used
        return Held(
            capacity={i: rows.capacity for i, rows in store.pool.items()},
            layer_bytes={i: count_held(store, i) for i in self.layers},
            near_used=store.near.used,
            index_used=store.index.used,
            home_used=store.home.used,
            home_grows=store.home.roomy,
            remembers=bool(store.shadow),
            metadata_has_room=all(part.capacity > part.length for part in [*metadata, *store.shadow.values()]),
            sets=None
            if not sets
            else SetsHeld(
                {i: each.size.records for i, each in sets.items()},
                next(iter(sets.values())).size.batch,
                sum(each.rows.n_bytes for each in sets.values()),
                sum(each.size.metadata_bytes for each in sets.values()),
            ),
            pages=take_pages(store),
        )

    # --- the plan, applied ------------------------------------------------------------------------------------

    def _claim(self, plan: BytePlan) -> None:
        """Be promised what a plan takes; copies of other caches make room.

        Raises:
            CapacityError: bytes were taken since they were counted; nothing has changed.
        """
        for ledger, tier in ((self.store.near, plan.near_bytes), (self.store.host, plan.host_bytes)):
            if ledger.parent is not None and ledger.parent.is_shared:
                self.store.shared.reclaim(self.store, ledger.tier, tier.total - ledger.counted)
                ledger.promise(tier.total, tier.copies)

    def _apply(self, plan: BytePlan, shape: LayerShape) -> None:
        store = self.store
        self.chunk_tokens = plan.chunk_tokens or self.chunk_tokens
        if plan.remember_tokens:
            store.remember_all(plan.remember_tokens)
        if plan.reserve is not None:
            store.reserve(plan.reserve)
        if self.policy is not None:
            self.policy.reserve(plan.pool_rows, max(plan.rows.values()))
        store.read_in_blocks(plan.near.block_tokens, only=plan.near.streams)
        # Whether growing rows may take more than they need: near memory may be the home of records.
        store.near.roomy, store.index.roomy = plan.near_grows, plan.index_grows
        store.home.roomy = plan.home_grows
        if plan.recent.drops:
            store.drop_recently_used()
        if store.page_cache is not None and plan.cache is not None:
            if plan.cache.room - plan.recent.pages < store.page_cache.used:
                # A deliberate wait: which copies go must not depend on how far a fetch is.
                store.link.drain()
            store.page_cache.resize(plan.cache.room, plan.cache.piece)
            # Once mapped, the room that metadata takes now stays at hand.
            store.page_cache.resize(plan.cache.room - plan.recent.pages, plan.cache.piece)
        for layer, n in (plan.recent.records or {}).items():
            pool = store.pool[layer]
            size = RecentSize(shape.batch, shape.kv_heads, plan.recent.slots, n, pool.width, pool.dtype)
            store.recently_used[layer] = RecentlyUsed(store.near, store.device, store.home, size)


def count_held(store: Store, layer: int) -> int:
    """Return the bytes that a layer's records and their metadata take now."""
    kept, pinned = store.kept.get(layer), store.pinned.get(layer)
    metadata = kept.places.n_bytes + kept.scores.n_bytes if kept else 0
    return store.pool[layer].n_bytes + metadata + (pinned.slots.n_bytes if pinned else 0)


def count_copies(store: Store, tier: str) -> int:
    """Return the bytes of a tier that are only copies of records, which other caches may have instead."""
    if tier == "near":
        return sum(each.rows.n_bytes for each in store.recently_used.values())
    pages = store.page_cache
    return 0 if pages is None else max(0, pages.used - LEAST_PAGES) * pages.pages.form.n_bytes


def take_pages(store: Store) -> PagesHeld | None:
    """Return the pages that there are; None where records are not on disk."""
    cache = store.page_cache
    if cache is None:
        return None
    n_tabled = sum(
        rows.heads[0] * rows.heads[1] * rows.table.length for rows in store.pool.values() if isinstance(rows, PagedRows)
    )
    return PagesHeld(
        has_file=cache.pages.file is not None,
        n_saved=cache.pages.n_saved,
        n_tabled=n_tabled,
        room=cache.room,
        used=cache.used,
        scratch=0 if cache.scratch is None else len(cache.scratch),
        disk_used=0 if store.limits.disk is None else store.limits.disk.ledger.used,
    )
