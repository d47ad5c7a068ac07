"""The far store of one cache: every layer's records in the host pool, and what of them is near.

In: new keys and values, chosen positions. Out: K and V that attention can read. Without a near limit on a CPU the
pool is near memory and nothing is copied; otherwise near memory is a counted allocation of its own and records
cross a link. Knows bytes and places, not scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.kept import Kept
from farkv.store.ledger import Ledger
from farkv.store.near import Buffers, Held, Tail
from farkv.store.records import Fetch, Keep, Needs, Read, StoreLimits
from farkv.store.rows import Rows, gather_rows
from farkv.store.transfer import Link


class Tiers:
    """Pool and near memory of all managed layers of one cache."""

    def __init__(self, layers: list[int], limits: StoreLimits, device: torch.device, form: Needs):
        self.limits, self.device, self.window = limits, device, form.window
        on_gpu = device.type == "cuda"
        near_is_counted = limits.near is not None or on_gpu
        self.far = near_is_counted and not form.at_home
        self.host = Ledger("host", limits.host)
        self.near = Ledger("near", limits.near)
        self.index = Ledger("index", None, self.near)
        # Where records live: near memory for a method that keeps them there, the host pool for all others.
        self.home = self.near if form.at_home and near_is_counted else self.host
        place = torch.device("cpu") if on_gpu and self.far else device
        self.order = {layer: i for i, layer in enumerate(layers)}
        self.pool = {
            layer: Rows(self.home, device=place, pin=on_gpu and self.far, reserve=limits.reserve_tokens)
            for layer in layers
        }
        self.kept = {layer: Kept(self.home, place) for layer in layers} if form.evicts else {}
        self.evicted = dict.fromkeys(layers, 0)
        # While steps of an evicting method are verified: every record, to compare with.
        self.shadow: dict[int, Rows] = {}
        self.tails = {layer: Tail(self.near, device, form.window + 1) for layer in layers} if self.far else {}
        self.holds = form.holds and self.far
        self.held: dict[int, Held] = {}
        self.buffers = Buffers(self.near, device)
        self.link = Link(device)
        self.k_dims: dict[int, int] = {}
        self.on_fetch: Callable[[int], None] = lambda n_bytes: None

    def length(self, layer: int) -> int:
        """Return the rows stored of a layer."""
        return self.pool[layer].length

    def seen(self, layer: int) -> int:
        """Return the tokens a layer was given, evicted ones included."""
        return self.pool[layer].length + self.evicted[layer]

    def batch(self, layer: int) -> int:
        """Return the number of sequences."""
        data = self.pool[layer].data
        return 0 if data is None else data.shape[0]

    def heads(self, layer: int) -> tuple[int, int]:
        """Return the number of sequences and of KV heads."""
        data = self.pool[layer].data
        assert data is not None
        return data.shape[0], data.shape[1]

    def reserve(self, rows: dict[int, int]) -> None:
        """Make every layer's first allocation this many rows."""
        for layer, n in rows.items():
            self.pool[layer].reserve = n
            if layer in self.kept:
                self.kept[layer].places.reserve = self.kept[layer].marks.reserve = n
            if layer in self.held:
                self.held[layer].slots.reserve = n

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' records."""
        self.k_dims[layer] = k.shape[-1]
        if layer in self.shadow:
            self.shadow[layer].append(k, v)
        if layer in self.kept:
            self.kept[layer].append(k, self.seen(layer))
        self.pool[layer].append(k, v)
        if layer in self.held:
            self.held[layer].append(k.shape[2])
        if self.far:
            self.tails[layer].push(k, v)

    def pass_by(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Count new tokens whose records are stored by `put` once it is known which stay."""
        self.k_dims[layer] = k.shape[-1]
        if layer in self.shadow:
            self.shadow[layer].append(k, v)
        self.evicted[layer] += k.shape[2]

    def put(self, layer: int, k: Tensor, v: Tensor, kept: Keep) -> None:
        """Store those of the passing tokens' records that stay: k and v are of all of them."""
        assert self.pool[layer].length == 0
        positions = kept.positions
        at = positions[..., None].to(k.device)
        # One part at a time, so that no more than what stays is ever copied.
        self.pool[layer].append(*(t.gather(2, at.expand(-1, -1, -1, t.shape[-1])) for t in (k, v)))
        self.kept[layer].put(positions, kept.marks, kept.gapless)
        self.evicted[layer] -= positions.shape[-1]

    def evict(self, layer: int, kept: Keep) -> None:
        """Drop every record of a layer but those at the kept positions, and free their memory."""
        before = self.length(layer)
        at = kept.positions.to(self.pool[layer].device)
        self.pool[layer].keep(at)
        self.kept[layer].keep(at, kept.marks.to(at.device), kept.gapless)
        if layer in self.held:
            self.held[layer].keep(at)
        self.evicted[layer] += before - self.length(layer)

    def hold_near(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Hold these records near from now on; fetches bring only the others. Nothing to do where the pool is near."""
        if not self.far:
            return
        pool = self.pool[layer]
        assert pool.data is not None
        held = self.held.setdefault(layer, Held(self.near, self.device, self.host, pool.device))
        held.hold(pool.data, positions, pool.length)

    def locate(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, "B Hkv K"]:
        """Return the tokens, counted from the context's begin, of the rows at `positions`."""
        if not self.evicted[layer]:
            return positions
        return self.kept[layer].places.view()[..., 0].to(positions.device).gather(-1, positions).long()

    def remember_all(self, tokens: int) -> None:
        """Keep every record besides, of `tokens` at first, to verify against; counted against the same limit."""
        if self.kept and not self.shadow:
            self.shadow = {
                layer: Rows(self.home, device=rows.device, reserve=tokens) for layer, rows in self.pool.items()
            }

    def all_keys(self, layer: int) -> Tensor:
        """Return the keys of every token, evicted ones too where steps are verified."""
        rows = self.shadow.get(layer, self.pool[layer])
        return rows.view()[..., : self.k_dims[layer]]

    def keys(self, layer: int) -> Tensor:
        """Return all keys in place, [B, Hkv, S, Dk], in the pool's memory."""
        return self.pool[layer].view()[..., : self.k_dims[layer]]

    def records(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all K and V of a layer in place, in the pool's memory."""
        rows, k_dim = self.pool[layer].view(), self.k_dims[layer]
        return rows[..., :k_dim], rows[..., k_dim:]

    @contextmanager
    def hold(self, n_bytes: int) -> Iterator[None]:
        """Count a transient near allocation while it lives."""
        self.near.charge(n_bytes if self.far else 0)
        try:
            yield
        finally:
            self.near.release(n_bytes if self.far else 0)

    @contextmanager
    def read_all(self, layer: int, *, whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all K and V of a layer for the time of one attention: in place, or as a counted near copy.

        Args:
            whole: evicted records too, where they are remembered.
        """
        held, k_dim = self.shadow.get(layer, self.pool[layer]) if whole else self.pool[layer], self.k_dims[layer]
        rows = held.view()
        if not self.far:
            yield rows[..., :k_dim], rows[..., k_dim:]
            return
        n_bytes = rows.numel() * rows.element_size()
        with self.hold(n_bytes):
            # A deliberate copy over the link: a dense pass needs the whole layer near.
            near = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
            near.copy_(rows)
            self.on_fetch(n_bytes)
            yield near[..., :k_dim], near[..., k_dim:]

    def fetch(
        self, layer: int, positions: Int[Tensor, "B Hkv K"], valid: Bool[Tensor, "B Hkv K"] | None, spare: int
    ) -> Fetch:
        """Start bringing records near; leave room for `spare` rows that join at the read.

        Where the pool is near memory this only remembers the positions.
        """
        if not self.far:
            return Fetch(positions, valid, None, None)
        rows = self.pool[layer].data
        assert rows is not None
        n = positions.shape[-1]
        shape = (rows.shape[0], rows.shape[1], n + spare, rows.shape[3])
        buffer = self.buffers.take(self.order[layer] % 2, shape, rows.dtype)
        ticket = self.link.fetch(rows, positions, valid, buffer, self.on_fetch, self.held.get(layer)) if n else None
        return Fetch(positions, valid, ticket, buffer)

    def read(self, layer: int, early: Fetch, late: Fetch | None, n_tail: int) -> Read:
        """Join what was fetched early, a late top-up and the `n_tail` newest records.

        Returns:
            K and V, [B, Hkv, K, D], with positions; rows of invalid positions hold anything finite.
        """
        batch, heads = early.positions.shape[:2]
        total = self.length(layer)
        device = early.positions.device
        tail = torch.arange(total - n_tail, total, device=device).expand(batch, heads, n_tail)
        parts = [early, late] if late is not None else [early]
        positions = torch.cat([p.positions for p in parts] + [tail], -1)
        valid = None
        if any(p.valid is not None for p in parts):
            flags = [torch.ones_like(p.positions, dtype=torch.bool) if p.valid is None else p.valid for p in parts]
            valid = torch.cat([*flags, torch.ones_like(tail, dtype=torch.bool)], -1)
        rows = self._join(layer, parts, positions, n_tail)
        k_dim = self.k_dims[layer]
        return Read(rows[..., :k_dim], rows[..., k_dim:], positions, valid)

    def _join(self, layer: int, parts: list[Fetch], positions: Tensor, n_tail: int) -> Tensor:
        pool = self.pool[layer]
        assert pool.data is not None
        if not self.far:
            return gather_rows(pool.data, positions)
        buffer = parts[0].buffer
        assert buffer is not None
        at = parts[0].positions.shape[-1]
        for part in parts[1:]:
            n = part.positions.shape[-1]
            place = buffer[:, :, at : at + n]
            self.link.fetch(pool.data, part.positions, part.valid, place, self.on_fetch, self.held.get(layer)).wait()
            at += n
        buffer[:, :, at : at + n_tail].copy_(self._newest(layer, n_tail))
        if parts[0].ticket is not None:
            parts[0].ticket.wait()
        return buffer[:, :, : at + n_tail]

    def _newest(self, layer: int, n: int) -> Tensor:
        """Return the newest rows, from near memory, or from the pool after a crop or a reordering."""
        near = self.tails[layer].newest(n)
        if near is not None:
            return near
        rows, k_dim = self.pool[layer].view()[:, :, -n:], self.k_dims[layer]
        self.on_fetch(rows.numel() * rows.element_size())
        self.tails[layer].length = 0
        moved = rows.to(self.device)
        self.tails[layer].push(moved[..., :k_dim], moved[..., k_dim:])
        return moved

    def crop(self, layer: int, n_tokens: int) -> None:
        """Forget the newest tokens of a layer.

        Raises:
            CacheStateError: what came before them is evicted.
        """
        if layer in self.kept:
            self.kept[layer].crop(n_tokens, self.evicted[layer])
        self.pool[layer].crop(n_tokens)
        if layer in self.shadow:
            self.shadow[layer].crop(n_tokens)
        if layer in self.held:
            self.held[layer].crop(n_tokens)
        if self.far:
            self.tails[layer].crop(n_tokens)

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        for held in self._of_layer(layer):
            held.select(sequences)
        if self.far:
            self.tails[layer].clear()
            self.buffers.clear()

    def clear(self, layer: int) -> None:
        """Free a layer."""
        for held in self._of_layer(layer):
            held.clear()
        self.evicted[layer] = 0
        if self.far:
            self.tails[layer].clear()
            self.buffers.clear()

    def _of_layer(self, layer: int) -> list[Rows | Kept | Held]:
        found = [self.pool[layer], self.kept.get(layer), self.shadow.get(layer), self.held.get(layer)]
        return [held for held in found if held is not None]
