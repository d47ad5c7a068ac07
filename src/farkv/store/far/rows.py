"""A growing tensor of rows, [B, Hkv, capacity, W]: how pool, index and metadata are stored.

In: new rows. Out: views of the stored rows. Knows bytes, not what the rows mean.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from farkv._axes import Int, Tensor
from farkv.errors import CapacityError
from farkv.store.ledger import Ledger
from farkv.store.memory import Mover, allocate
from farkv.store.sizes import grow_capacity

# Tokens that a reordering moves at a time, through scratch memory that is not charged to any ledger.
REORDER_TOKENS = 64
# Rows that an eviction moves at a time, likewise.
MOVE_ROWS = 512


class Rows:
    """Rows per token, appended and cropped at the end; the ledger is charged for the capacity.

    Args:
        reserve: rows of the first allocation.
        row_tokens: tokens per row.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        device: torch.device,
        pin: bool = False,
        reserve: int = 0,
        mover: Mover | None = None,
        row_tokens: int = 1,
    ):
        self.row_tokens = row_tokens
        self.ledger, self.device, self.pin, self.reserve, self.mover = ledger, device, pin, reserve, mover
        self.data: Tensor | None = None
        self.length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        """Copy rows that a GPU reads into memory that it can read: a copied tensor would not be pinned."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            if name != "data" or value is None or not self.pin:
                setattr(twin, name, copy.deepcopy(value, memo))
            else:
                twin.data = allocate(tuple(value.shape), value.dtype, self.device, pin=True).copy_(value)
        return twin

    @property
    def n_bytes(self) -> int:
        """Bytes of the allocation."""
        return 0 if self.data is None else self.data.numel() * self.data.element_size()

    @property
    def heads(self) -> tuple[int, int]:
        """Return the number of sequences and of KV heads."""
        return (0, 0) if self.data is None else (self.data.shape[0], self.data.shape[1])

    @property
    def capacity(self) -> int:
        """Return the number of rows that there is room for."""
        return 0 if self.data is None else self.data.shape[2]

    @property
    def width(self) -> int:
        """Return the number of elements of a row."""
        assert self.data is not None
        return self.data.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the elements."""
        assert self.data is not None
        return self.data.dtype

    def get(self) -> Tensor:
        """Return the allocation, [B, Hkv, capacity, W]; what lies behind the stored rows is garbage."""
        assert self.data is not None
        return self.data

    def view(self) -> Tensor:
        """Return the stored rows, [B, Hkv, S, W], without a copy."""
        assert self.data is not None
        return self.data.narrow(2, 0, self.length)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows of tokens `start` to `stop`, [B, Hkv, stop - start, W], without a copy."""
        assert self.data is not None
        return self.data.narrow(2, start, stop - start)

    def copy_to(self, out: Tensor) -> None:
        """Copy all stored rows into `out`, [B, Hkv, S, W]."""
        out.copy_(self.view())

    def take(self, heads: Int[Tensor, " N"], positions: Int[Tensor, " N"], out: Tensor) -> None:
        """Copy the row at `positions[j]` of head `heads[j]` (sequence * Hkv + head) into `out[j]`.

        Cost: N * W elements read and written.
        """
        # A local reference: the model's thread may replace `self.data` by a larger allocation meanwhile.
        data = self.data
        assert data is not None
        if self.mover is not None and data.device.type == out.device.type == "cpu":
            self.mover.gather(data, heads, positions.contiguous(), out)
            return
        torch.index_select(data.view(-1, data.shape[3]), 0, heads * data.shape[2] + positions, out=out)

    def take_each(self, positions: Int[Tensor, "B Hkv K"], out: Tensor) -> None:
        """Copy the rows at `positions` of every sequence and head into `out`, [B, Hkv, K, W].

        Cost: B * Hkv * K * W elements read and written.
        """
        # Of one row per head the flat positions are a view with the stride of a row.
        heads, places = spread_heads(positions), positions.reshape(-1).contiguous()
        if out.is_contiguous():
            self.take(heads, places, out.view(-1, out.shape[3]))
        elif self.mover is not None and self.device.type == out.device.type == "cpu" and self.data is not None:
            # `out` is part of a larger buffer: each head's rows are contiguous, heads are not.
            self.mover.gather(self.data, heads, places, out.view(-1, *out.shape[2:]))
        else:
            rows = torch.empty(len(places), out.shape[3], dtype=out.dtype, device=out.device)
            self.take(heads, places, rows)
            out.copy_(rows.view(out.shape))

    def append(self, *parts: Tensor) -> None:
        """Append rows, made of `parts` ([B, Hkv, T, w] each) side by side.

        Cost: T * W elements written; when the capacity grows, one copy of all rows.
        """
        batch, heads, n_new, _ = parts[0].shape
        if self.data is None or self.length + n_new > self.data.shape[2]:
            width = sum(p.shape[-1] for p in parts)
            self.ensure((batch, heads, self.length + n_new, width), parts[0].dtype)
            assert self.data is not None
        place, at = self.data.narrow(2, self.length, n_new), 0
        # Deliberate copies: records live in the pool from here on (device to host on a GPU).
        if n_new == 1 and len(parts) > 1 and parts[0].device == place.device:
            # One token's parts are joined first: one copy is called instead of one for each.
            place.copy_(torch.cat(parts, -1))
            parts = ()
        for part in parts:
            width = part.shape[-1]
            place.narrow(3, at, width).copy_(part)
            at += width
        self.length += n_new

    def ensure(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        """Make room for shape[2] rows in all, and a quarter more where the ledger has room for it."""
        batch, heads, need, width = shape
        capacity = self.capacity
        if need <= capacity:
            return
        row_bytes = batch * heads * width * torch.empty((), dtype=dtype).element_size()
        if capacity == 0 and need <= self.reserve:
            wanted = self.reserve
        else:
            n = self.row_tokens
            # In tokens: admission assumes growth in steps of tokens.
            wanted = -(-grow_capacity(capacity * n, need * n) // n) if self.ledger.roomy else need
        if not self.ledger.has_room(wanted * row_bytes):
            wanted = need
        self.ledger.charge(wanted * row_bytes)
        try:
            grown = allocate((batch, heads, wanted, width), dtype, self.device, pin=self.pin)
        except RuntimeError as error:
            self.ledger.release(wanted * row_bytes)
            raise CapacityError(
                f"{self.ledger.tier}: the system refuses {wanted * row_bytes:,} bytes of memory; give a lower "
                f"{self.ledger.tier} limit, or shorten the context"
            ) from error
        if self.data is not None:
            grown[:, :, : self.length] = self.view()
            self.ledger.release(self.n_bytes)
        self.data = grown

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the rows at ascending `positions` of every sequence and head, and free the rest.

        Rows move within the allocation where a smaller one is not allowed (the reserve) or has no room beside it.

        Cost: K rows of every head read and written.
        """
        assert self.data is not None
        n = positions.shape[-1]
        batch, heads, capacity, width = self.data.shape
        wanted = max(n, min(self.reserve, capacity))
        row_bytes = batch * heads * width * self.data.element_size()
        if wanted == capacity or not self.ledger.has_room(wanted * row_bytes):
            # Safe in place: positions are ascending, so no row moves to a later place.
            for start in range(0, n, MOVE_ROWS):
                piece = gather_rows(self.data, positions[..., start : start + MOVE_ROWS])
                self.data[:, :, start : start + piece.shape[2]].copy_(piece)
            self.length = n
            return
        self.ledger.charge(wanted * row_bytes)
        kept = allocate((batch, heads, wanted, width), self.data.dtype, self.device, pin=self.pin)
        for start in range(0, n, MOVE_ROWS):
            piece = gather_rows(self.data, positions[..., start : start + MOVE_ROWS])
            kept[:, :, start : start + piece.shape[2]].copy_(piece)
        self.ledger.release(self.n_bytes)
        self.data, self.length = kept, n

    def cut(self, length: int) -> None:
        """Remove all rows but the first `length`."""
        self.length = min(self.length, max(0, length))

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order, repeats allowed."""
        if self.data is None:
            return
        if sequences.tolist() == list(range(self.data.shape[0])):
            return  # Beams that stayed: nothing to copy. (Beam search waits for the device here anyway.)
        where = sequences.to(self.device)
        if len(sequences) == self.data.shape[0]:
            # In place, a few tokens at a time: no second copy of a layer, which a tight limit may not allow.
            for start in range(0, self.length, REORDER_TOKENS):
                piece = self.data[:, :, start : min(start + REORDER_TOKENS, self.length)]
                piece.copy_(piece.index_select(0, where))
            return
        self.ledger.charge(self.n_bytes // self.data.shape[0] * len(sequences))
        old_bytes = self.n_bytes
        chosen = allocate((len(sequences), *self.data.shape[1:]), self.data.dtype, self.device, pin=self.pin)
        torch.index_select(self.data, 0, where, out=chosen)
        self.data = chosen
        self.ledger.release(old_bytes)

    def join(self, other: Rows, length: int, batches: tuple[int, int]) -> None:
        """Append another's sequences to the batch, all with `length` rows; shorter ones are left-padded with zeros.

        `other` is empty afterwards.

        Args:
            batches: the number of sequences of both: one may have no rows yet.

        Cost: one copy of both.
        """
        like = self if self.data is not None else other
        assert like.data is not None
        heads, width, dtype = like.data.shape[1], like.width, like.dtype
        row_bytes = sum(batches) * heads * width * dtype.itemsize
        wanted = max(length, self.reserve, max(self.capacity, other.capacity) if self.ledger.roomy else 0)
        wanted = wanted if self.ledger.has_room(wanted * row_bytes) else length
        self.ledger.charge(wanted * row_bytes)
        joined = allocate((sum(batches), heads, wanted, width), dtype, self.device, pin=self.pin)
        for rows, part in zip((self, other), joined.split(batches), strict=True):
            start = length - rows.length
            part[:, :, :start] = 0
            if rows.length:
                part[:, :, start:length].copy_(rows.view())
        self.ledger.release(self.n_bytes)
        self.data, self.length = joined, length
        other.clear()

    def clear(self) -> None:
        """Free everything."""
        self.ledger.release(self.n_bytes)
        self.data, self.length = None, 0


def spread_heads(positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, " N"]:
    """Return the head of every position, numbered over all sequences."""
    batch, heads, n = positions.shape
    return torch.arange(batch * heads, device=positions.device).repeat_interleave(n)


def gather_rows(rows: Tensor, positions: Int[Tensor, "B Hkv K"]) -> Tensor:
    """Gather rows per sequence and head: out[b, h, j] = rows[b, h, positions[b, h, j]].

    Cost: B * Hkv * K * W elements read and written.
    """
    batch, heads, capacity, width = rows.shape
    base = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * capacity
    flat = (positions + base).reshape(-1)
    return rows.view(-1, width).index_select(0, flat).view(batch, heads, -1, width)
