"""All tiers of one cache: what attention reads at a step, and how it is brought near.

In: new keys and values, chosen positions. Out: K and V that attention can read. On a CPU without a near limit the
pool is near memory and nothing is copied; otherwise near memory has allocations of its own, charged to its ledger, and
records cross the link. Knows bytes and positions, does no scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.pool import FarStore
from farkv.store.far.rows import Rows, spread_heads
from farkv.store.follow import Follower
from farkv.store.link import Link, Ticket
from farkv.store.near.buffers import Buffers, RecentWindow
from farkv.store.near.pinned import Pinned
from farkv.store.near.recently_used import RecentlyUsed, give_sets_back
from farkv.store.records import Fetch, Needs, Read, Stored, StoreLimits
from farkv.store.shared import copy_store

# Tokens per block of a dense read, where the whole layer does not fit near.
BLOCK_TOKENS = 1024


class Store(FarStore):
    """All tiers of one cache."""

    def __init__(self, layers: list[int], limits: StoreLimits, device: torch.device, needs: Needs):
        super().__init__(layers, limits, device, needs)
        self.window = needs.window
        far = layers if self.is_far else []
        self.windows = {layer: RecentWindow(self.near, device, needs.window + 1) for layer in far}
        self.pins, self.pinned = needs.pins and self.is_far, dict[int, Pinned]()
        # In the rest of the near limit, where no plan pins records: admission creates and frees these.
        self.recently_used: dict[int, RecentlyUsed] = {}
        self.buffers = Buffers(self.near, device)
        self.link = Link(device, needs.worker)
        # Whether dense reads go block by block; set by admission.
        self.streams, self.block_tokens = False, BLOCK_TOKENS
        # Called with the bytes of every fetch.
        self.on_fetch: Callable[[int], None] = lambda n_bytes: None
        self.shared.add(self)

    __deepcopy__ = copy_store

    def listen(self, on_fetch: Callable[[int], None], on_disk: Callable[[int], None]) -> None:
        """Call these with the bytes of every fetch, and of every read from disk."""
        self.on_fetch, self.on_disk = on_fetch, on_disk

    def read_in_blocks(self, block_tokens: int, *, only: bool) -> None:
        """Set the tokens per block of dense reads, and whether these go `only` by blocks, never by whole layers."""
        self.streams, self.block_tokens = only, block_tokens

    # --- records in -----------------------------------------------------------------------------------------

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' records."""
        parts = self.encode(layer, k, v)
        self.add(layer, k, v, parts)
        if layer in self.pinned:
            self.pinned[layer].append(k.shape[2])
        if self.is_far:
            self.windows[layer].push(*parts, seen=self.seen(layer))

    def reserve(self, rows: dict[int, int]) -> None:
        """Set the rows of every layer's first allocation."""
        super().reserve(rows)
        for layer, n in rows.items():
            if layer in self.pinned:
                self.pinned[layer].slots.reserve = n

    def pin(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Pin these records near from now on; fetches bring only the others. Does nothing where the pool is near."""
        if not self.is_far:
            return
        pool = self.pool[layer]
        pinned = self.pinned.setdefault(layer, Pinned(self.near, self.device, self.host, pool.device))
        at = positions.to(pool.device)
        # The table of slots has the pool's capacity.
        pinned.pin(self.gather(layer, at), at, (pool.length, pool.capacity))

    def drop_recently_used(self) -> None:
        """Free every recently used set: the memory is needed, or the number of sequences changes."""
        self.drain()  # Pending fetches write to these sets.
        for layer in list(self.recently_used):
            self.recently_used.pop(layer).clear()

    def give_back(self, tier: str, n_bytes: int) -> None:
        """Drop copies of records for another cache, on its thread: `n_bytes` of them, or all but what reading needs."""
        if tier == "near":
            give_sets_back(self.recently_used, self.near, self.device)
        elif self.page_cache is not None:
            self.page_cache.give_back(n_bytes)

    def find_near(self, layer: int) -> Pinned | RecentlyUsed | None:
        """Return the near copies of a layer's records that fetches skip."""
        return self.pinned.get(layer) or self.recently_used.get(layer)

    def find_resident(self, layer: int) -> tuple[Bool[Tensor, "B Hkv P"], int]:
        """Return what has a copy in host memory, or will; see `FarStore.find_resident`."""
        if self.device.type != "cpu" or self.recently_used or self.pinned:
            # A deliberate wait: there the link's thread gives pages their slots, and its speed must choose nothing.
            self.link.drain()
        return super().find_resident(layer)

    def drain(self) -> None:
        """Wait for every fetch in flight."""
        self.link.drain()
        if self.page_cache is not None:
            self.page_cache.rest()

    # --- dense reads ----------------------------------------------------------------------------------------

    @contextmanager
    def hold(self, n_bytes: int, *, gathered: bool = False) -> Iterator[None]:
        """Charge a transient copy of records for its lifetime: where records are far, or it is `gathered` in place."""
        n_bytes = n_bytes if self.is_far or gathered else 0
        self.near.charge(n_bytes)
        try:
            yield
        finally:
            self.near.release(n_bytes)

    @contextmanager
    def read_all(self, layer: int, *, whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all K and V of a layer for one attention call: in place, or as a near copy that is charged.

        Args:
            whole: include evicted records, where they were remembered.
        """
        k_dim = self.shapes[layer].k_dim
        remembered = self.shadow.get(layer) if whole else None
        if not self.is_far:
            rows = self.rows(layer) if remembered is None else remembered.view()
            yield rows[..., :k_dim], rows[..., k_dim:]
            return
        pool = self.pool[layer] if remembered is None else remembered
        with self.hold(self.count_near_bytes(layer, pool)):
            # A deliberate copy over the link: a dense pass needs the whole layer near.
            near = torch.empty(*pool.heads, pool.length, pool.width, dtype=pool.dtype, device=self.device)
            pool.copy_to(near)
            self.on_fetch(near.numel() * near.element_size())
            rows = near if remembered is not None else self.decode(layer, near)
            yield rows[..., :k_dim], rows[..., k_dim:]

    def count_near_bytes(self, layer: int, rows: Rows | PagedRows, n_tokens: int | None = None) -> int:
        """Return the near bytes of reading `n_tokens` (default: all): a copy, and its decoded form."""
        n = rows.heads[0] * rows.heads[1] * (rows.length if n_tokens is None else n_tokens)
        codec = self.codecs.get(layer) if rows is self.pool[layer] else None
        decoded = 0 if codec is None else (codec.k_dim + codec.v_dim) * codec.dtype.itemsize
        return n * (rows.width * rows.dtype.itemsize + decoded)

    def read_blocks(self, layer: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield K and V of a layer's first `stop` rows, block by block: the next is fetched while one is read.

        Yields:
            The first row of the block, its K and V; valid until the next block is requested.

        Cost: two blocks near; every stored row read once.
        """
        k_dim, n = self.shapes[layer].k_dim, self.block_tokens
        if self.page_cache is not None:
            n -= n % min(n, self.page_cache.pages.form.tokens)  # Whole pages, where a block can hold one.
        ends = [(start, min(start + n, stop)) for start in range(0, stop, n)]
        coming = [self._bring_block(layer, *ends[0])] if ends else []
        taken = 0
        try:
            for i, (start, _) in enumerate(ends):
                ticket, taken = coming.pop()
                stored = ticket.result()
                if i + 1 < len(ends):
                    coming.append(self._bring_block(layer, *ends[i + 1]))
                rows = self.decode(layer, stored)
                yield start, rows[..., :k_dim], rows[..., k_dim:]
                self.near.release(taken)
                taken = 0
        finally:
            # Also when the pass stops half way.
            self.near.release(taken + sum(n_bytes for _, n_bytes in coming))

    def _bring_block(self, layer: int, start: int, stop: int) -> tuple[Ticket, int]:
        pool = self.pool[layer]
        taken = self.count_near_bytes(layer, pool, stop - start)
        self.near.charge(taken)

        def bring() -> Tensor:
            near = pool.read(start, stop).to(self.device, copy=isinstance(pool, Rows))  # A deliberate copy.
            self.on_fetch(near.numel() * near.element_size())
            return near

        return self.link.submit(bring), taken

    # --- chosen records -------------------------------------------------------------------------------------

    def gather(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> Tensor:
        """Return copies of the stored rows at `positions`, [B, Hkv, K, W], in the pool's memory."""
        pool = self.pool[layer]
        out = torch.empty(*positions.shape, pool.width, dtype=pool.dtype, device=pool.device)
        pool.take(spread_heads(positions), positions.reshape(-1), out.view(-1, pool.width))
        return out

    def fetch(
        self, layer: int, positions: Int[Tensor, "B Hkv K"], valid: Bool[Tensor, "B Hkv K"] | None, spare: int
    ) -> Fetch:
        """Start bringing records near, into a buffer with room for `spare` more rows that `join` adds.

        Where the pool is near memory, this only remembers the positions.
        """
        if not self.is_far:
            return Fetch(positions, valid, None, None)
        pool = self.pool[layer]
        n = positions.shape[-1]
        shape = (positions.shape[0], positions.shape[1], n + spare, pool.width)
        buffer = self.buffers.take(self.order[layer] % 2, shape, pool.dtype)
        ticket = self.link.fetch(pool, positions, valid, buffer, self.on_fetch, self.find_near(layer)) if n else None
        return Fetch(positions, valid, ticket, buffer)

    def read(self, layer: int, early: Fetch, late: Fetch | None, n_newest: int) -> Read:
        """Join the early fetch, a late top-up and the `n_newest` newest records.

        Returns:
            K and V, [B, Hkv, K, D], with positions; rows at invalid positions are finite but otherwise undefined.
        """
        stored = self.join(layer, early, late, n_newest)
        rows, k_dim = self.decode(layer, stored.rows), self.shapes[layer].k_dim
        return Read(rows[..., :k_dim], rows[..., k_dim:], stored.positions, stored.valid)

    def join(self, layer: int, early: Fetch, late: Fetch | None, n_newest: int) -> Stored:
        """As `read`, but return the rows as they are stored."""
        batch, heads = early.positions.shape[:2]
        total = self.length(layer)
        newest = torch.arange(total - n_newest, total, device=early.positions.device).expand(batch, heads, n_newest)
        parts = [early, late] if late is not None else [early]
        positions = torch.cat([p.positions for p in parts] + [newest], -1)
        valid = None
        if any(p.valid is not None for p in parts):
            flags = [torch.ones_like(p.positions, dtype=torch.bool) if p.valid is None else p.valid for p in parts]
            valid = torch.cat([*flags, torch.ones_like(newest, dtype=torch.bool)], -1)
        return Stored(self._join(layer, parts, positions, n_newest), positions, valid)

    def _join(self, layer: int, parts: list[Fetch], positions: Tensor, n_newest: int) -> Tensor:
        if not self.is_far:
            return self.gather(layer, positions)
        buffer = parts[0].buffer
        assert buffer is not None
        at = parts[0].positions.shape[-1]
        for part in parts[1:]:
            n = part.positions.shape[-1]
            place, near = buffer[:, :, at : at + n], self.find_near(layer)
            self.link.fetch(self.pool[layer], part.positions, part.valid, place, self.on_fetch, near).wait()
            at += n
        buffer[:, :, at : at + n_newest].copy_(self._newest(layer, n_newest))
        if parts[0].ticket is not None:
            parts[0].ticket.wait()
        return buffer[:, :, : at + n_newest]

    def _newest(self, layer: int, n: int) -> Tensor:
        """Return the newest rows, from the recent window, or from the pool after a crop or a reordering."""
        window, seen = self.windows[layer], self.seen(layer)
        near = window.newest(n, seen)
        if near is not None:
            return near
        total = self.length(layer)
        rows = self.pool[layer].read(total - n, total)
        self.on_fetch(rows.numel() * rows.element_size())
        window.length = 0
        near = rows.to(self.device)
        window.push(near, seen=seen)
        return near

    # --- the batch ------------------------------------------------------------------------------------------

    def following(self, layer: int) -> list[Follower]:
        """Return the followers of a layer's records: those registered, and its near copies."""
        near = (self.windows.get(layer), self.pinned.get(layer), self.recently_used.get(layer))
        return super().following(layer) + [each for each in near if each is not None]

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if len(sequences) != self.batch(layer):
            self.drop_recently_used()  # Their tables are sized for the old number of sequences.
        super().select(layer, sequences)
        self.buffers.clear()

    def clear(self, layer: int) -> None:
        """Free a layer."""
        super().clear(layer)
        self.recently_used.pop(layer, None)
        self.buffers.clear()
        if self.page_cache is not None and not any(rows.length for rows in self.pool.values()):
            # A pending block would keep the file open. Its pages and a saved text go too: new records open another.
            self.drain()
            self.page_cache.clear()
            self.page_cache, self.limits = None, self.limits._replace(saved=None)
