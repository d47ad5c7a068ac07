"""The far store of one cache: every layer's records in the host pool, and what of them is near.

In: new keys and values, chosen positions. Out: K and V that attention can read. Without a near limit on a CPU the
pool is near memory and nothing is copied; otherwise near memory is a counted allocation of its own and records
cross a link. Knows bytes and places, not scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.ledger import Ledger
from farkv.store.near import Buffers, Tail
from farkv.store.rows import Rows
from farkv.store.sizes import LayerShape, NearNeed, grow_capacity
from farkv.store.transfer import Link, Ticket


class StoreLimits(NamedTuple):
    """Byte limits and the context to make room for; None and 0 where nothing is said."""

    near: int | None = None
    host: int | None = None
    reserve_tokens: int = 0


class Fetch(NamedTuple):
    """Records asked for: where they are, which are real, and the ticket where they travel."""

    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
    ticket: Ticket | None
    buffer: Tensor | None


class Read(NamedTuple):
    """What attention reads at one decode step; `positions` are the records' places in the context."""

    k: Tensor
    v: Tensor
    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None


class Tiers:
    """Pool and near memory of all managed layers of one cache."""

    def __init__(self, layers: list[int], limits: StoreLimits, device: torch.device, window: int):
        self.limits, self.device = limits, device
        self.far = limits.near is not None or device.type == "cuda"
        self.host = Ledger("host", limits.host)
        self.near = Ledger("near", limits.near)
        self.index = Ledger("index", None, self.near)
        on_gpu = device.type == "cuda"
        place = torch.device("cpu") if on_gpu else device
        self.order = {layer: i for i, layer in enumerate(layers)}
        self.pool = {
            layer: Rows(self.host, device=place, pin=on_gpu, reserve=limits.reserve_tokens) for layer in layers
        }
        self.window = window
        self.tails = {layer: Tail(self.near, device, window + 1) for layer in layers} if self.far else {}
        self.buffers = Buffers(self.near, device)
        self.link = Link(device)
        self.k_dims: dict[int, int] = {}
        self.on_fetch: Callable[[int], None] = lambda n_bytes: None

    def length(self, layer: int) -> int:
        """Return the tokens stored of a layer."""
        return self.pool[layer].length

    def batch(self, layer: int) -> int:
        """Return the number of sequences."""
        data = self.pool[layer].data
        return 0 if data is None else data.shape[0]

    def admit(self, shape: LayerShape, n_new: int, need: NearNeed) -> None:
        """Refuse, before any layer is touched, `n_new` tokens that some limit cannot hold.

        Args:
            shape: of every managed layer.
            n_new: tokens of this forward pass.
            need: near bytes of this pass at its widest moment; ignored where the pool is near memory.

        Raises:
            CapacityError: with the bytes needed, the limit and the remedy.
        """
        first = next(iter(self.pool))
        total = max(self.length(first) + n_new, self.limits.reserve_tokens)
        room = grow_capacity(0, total)
        grow = [r for r in self.pool.values() if r.data is None or r.data.shape[2] < total]
        if self.host.limit is not None and grow:
            kept = sum(r.n_bytes for r in self.pool.values() if r not in grow)
            # While a layer grows, its old rows are still there.
            kept += max(r.n_bytes for r in grow)
            end = kept + len(grow) * total * shape.token_bytes
            if end > self.host.limit:
                raise self.host.refuse(end - self.host.used, f"the KV of {total} tokens")
            self.host.roomy = kept + len(grow) * room * shape.token_bytes <= self.host.limit
        if self.far and self.near.limit is not None:
            if need.total > self.near.limit:
                parts = ", ".join(f"{name} {size:,}" for name, size in need._asdict().items())
                raise self.near.refuse(need.total - self.near.used, f"a context of {total} tokens ({parts})")
            self.index.roomy = need.total + need.index * (room - total) // total <= self.near.limit

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' records."""
        self.k_dims[layer] = k.shape[-1]
        self.pool[layer].append(k, v)
        if self.far:
            self.tails[layer].push(k, v)

    def keys(self, layer: int) -> Tensor:
        """Return all keys in place, [B, Hkv, S, Dk], in the pool's memory."""
        return self.pool[layer].view()[..., : self.k_dims[layer]]

    @contextmanager
    def hold(self, n_bytes: int) -> Iterator[None]:
        """Count a transient near allocation while it lives."""
        self.near.charge(n_bytes if self.far else 0)
        try:
            yield
        finally:
            self.near.release(n_bytes if self.far else 0)

    @contextmanager
    def read_all(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all K and V of a layer for the time of one attention: in place, or as a counted near copy."""
        rows, k_dim = self.pool[layer].view(), self.k_dims[layer]
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
        ticket = self.link.fetch(rows, positions, valid, buffer, self.on_fetch) if n else None
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
            self.link.fetch(pool.data, part.positions, part.valid, buffer[:, :, at : at + n], self.on_fetch).wait()
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
        """Forget the newest tokens of a layer."""
        self.pool[layer].crop(n_tokens)
        if self.far:
            self.tails[layer].crop(n_tokens)

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.pool[layer].select(sequences)
        if self.far:
            self.tails[layer].clear()
            self.buffers.clear()

    def clear(self, layer: int) -> None:
        """Free a layer."""
        self.pool[layer].clear()
        if self.far:
            self.tails[layer].clear()
            self.buffers.clear()


def gather_rows(rows: Tensor, positions: Int[Tensor, "B Hkv K"]) -> Tensor:
    """Gather rows per sequence and head: out[b, h, j] = rows[b, h, positions[b, h, j]].

    Cost: B * Hkv * K * W elements read and written.
    """
    batch, heads, capacity, width = rows.shape
    base = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * capacity
    flat = (positions + base).reshape(-1)
    return rows.view(-1, width).index_select(0, flat).view(batch, heads, -1, width)
