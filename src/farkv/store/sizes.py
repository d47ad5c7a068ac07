"""Shapes to bytes, before anything is allocated: arithmetic on shapes alone.

record   = (Dk + Dv) * itemsize                   one token of one KV head
kv       = L * B * Hkv * S * record               a full cache
index    = L * B * Hkv * S * R * index_itemsize
fetched  = L * B * Hkv * K_fetched * record       over the link, per decode step
"""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Tensor


class LayerShape(NamedTuple):
    """The shape of one managed layer's records."""

    batch: int
    kv_heads: int
    k_dim: int
    v_dim: int
    itemsize: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> LayerShape:
        """Return the shape of a layer with these keys, [B, Hkv, T, Dk], and values."""
        return cls(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.element_size())

    @property
    def record_bytes(self) -> int:
        """Bytes of K and V of one token and one KV head."""
        return (self.k_dim + self.v_dim) * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer, all KV heads and sequences."""
        return self.batch * self.kv_heads * self.record_bytes


def count_cap(fraction: float, tokens: int, least: int = 1) -> int:
    """Return how many of `tokens` records a KV head may read at this fraction: at least `least`, and the newest."""
    # The slack keeps binary rounding from making 0.1 * 30 less than 3.
    return min(tokens, max(1, least, int(fraction * tokens + 1e-9)))


def count_forced(cap: int, sinks: int, window: int, fraction: float, *, alone: bool = False) -> tuple[int, int]:
    """Return how many sinks and recent tokens are always read: together at most a quarter of the cap.

    Args:
        alone: no recent window is forced, so sinks may take the whole quarter; else at most half of it.
    """
    if fraction >= 1:
        return 0, 0
    room = cap // 4
    sinks = min(sinks, room if alone else room // 2)
    return sinks, min(window, room - sinks)


class Allowed(NamedTuple):
    """How many records per KV head a layer may keep of a context of t tokens: base + share * t."""

    base: int
    share: float

    def count(self, tokens: int) -> int:
        """Return the records, at most all of them."""
        return min(tokens, self.base + int(self.share * tokens + 1e-9))


def share_out(wanted: list[int], least: int, total: int) -> list[int]:
    """Raise every count to `least`, and lower the largest ones until the sum is at most `total`.

    Where even `least` of each exceeds the total, all get `least`, which is always kept.
    """
    counts = [max(least, n) for n in wanted]
    excess = sum(counts) - max(total, least * len(counts))
    while excess > 0:
        top = max(counts)
        # Of equal counts, first those that wanted less: no layer ends below one that wanted less than it.
        largest = sorted((i for i, n in enumerate(counts) if n == top), key=lambda i: wanted[i])
        below = max((n for n in counts if n < top), default=least)
        step = max(1, min(top - max(below, least), excess // len(largest)))
        for i in largest[: max(1, excess)]:
            taken = min(step, excess)
            counts[i] -= taken
            excess -= taken
    return counts


def fetched_bytes(shape: LayerShape, rows: int) -> int:
    """Return the bytes that cross the link when `rows` records of every KV head are fetched."""
    return shape.batch * shape.kv_heads * rows * shape.record_bytes


class NearNeed(NamedTuple):
    """Near bytes by purpose (held: pinned records and usage values). Prefill and decode steps never overlap."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    window: int
    prefill: int
    decode: int
    held: int = 0

    @property
    def total(self) -> int:
        """Return the peak bytes."""
        return self.index + self.window + self.held + max(self.prefill, self.decode)


def grow_capacity(capacity: int, need: int) -> int:
    """Return the next capacity in tokens: a quarter more than needed, in steps of 64."""
    return capacity if need <= capacity else -(-(need + need // 4) // 64) * 64
