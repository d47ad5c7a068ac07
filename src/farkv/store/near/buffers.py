"""Near memory where it is a tier of its own: two alternating fetch buffers, and each layer's recent window.

In: rows. Out: buffers to fetch into, and the window's rows. Everything is charged to the near ledger.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger


class Buffers:
    """Two buffers that consecutive layers use in turn: one is filled while the other is read."""

    def __init__(self, ledger: Ledger, device: torch.device):
        self.ledger, self.device = ledger, device
        self._areas: list[Tensor | None] = [None, None]

    def take(self, turn: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """Return this turn's buffer as [B, Hkv, K, W]; it grows as needed."""
        n = shape[0] * shape[1] * shape[2] * shape[3]
        area = self._areas[turn]
        if area is None or area.numel() < n or area.dtype != dtype:
            if area is not None:
                self._areas[turn] = None
                self.ledger.release(area.numel() * area.element_size())
            self.ledger.charge(n * torch.empty((), dtype=dtype).element_size())
            # Zeros: a row that was never fetched is masked, but must be finite, since 0 * NaN is NaN.
            area = torch.zeros(n, dtype=dtype, device=self.device)
            self._areas[turn] = area
        return area[:n].view(shape)

    def clear(self) -> None:
        """Free both."""
        for area in self._areas:
            if area is not None:
                self.ledger.release(area.numel() * area.element_size())
        self._areas = [None, None]


class RecentWindow:
    """The newest records of one layer, near: [B, Hkv, up to 2n, W], moved to the front when full."""

    def __init__(self, ledger: Ledger, device: torch.device, n: int):
        self.ledger, self.device, self.n = ledger, device, n
        self.data: Tensor | None = None
        # Rows, and the tokens that the layer had seen when the last of them was added.
        self.length = self.seen = 0

    def push(self, *parts: Tensor, seen: int) -> None:
        """Add new rows, made of `parts` side by side, the newest of `seen` tokens; only the last `n` are kept."""
        if parts[0].shape[2] > self.n:
            # The rows before these are not kept here: older rows must not take their place after a crop.
            self.length = 0
        parts = tuple(part[:, :, -self.n :] for part in parts)
        batch, heads, n_new, _ = parts[0].shape
        if self.data is None:
            shape = (batch, heads, 2 * self.n, sum(part.shape[-1] for part in parts))
            self.ledger.charge(batch * heads * shape[2] * shape[3] * parts[0].element_size())
            self.data = torch.empty(shape, dtype=parts[0].dtype, device=self.device)
        if self.length + n_new > 2 * self.n:
            keep = min(self.n - n_new, self.length) if n_new < self.n else 0
            newest = self.data[:, :, self.length - keep : self.length].clone()
            # Stopped in between, the window is empty, not wrong: the pool has all rows.
            self.length = 0
            self.data[:, :, :keep] = newest
            self.length = keep
        at = 0
        for part in parts:
            self.data[:, :, self.length : self.length + n_new, at : at + part.shape[-1]] = part
            at += part.shape[-1]
        self.length, self.seen = self.length + n_new, seen

    def newest(self, n: int, seen: int) -> Tensor | None:
        """Return the last `n` of `seen` tokens' rows, [B, Hkv, n, W], or None where they are not all here."""
        if self.data is None or self.length < n or self.seen != seen:
            return None
        return self.data[:, :, self.length - n : self.length]

    def crop(self, now: Cropped) -> None:
        """Remove the newest rows."""
        length = max(0, self.length - max(0, self.seen - now.seen))
        self.length, self.seen = length, min(self.seen, now.seen)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Do nothing: an eviction never removes the newest rows."""

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Drop the rows: the pool has them."""
        self.clear()

    def clear(self) -> None:
        """Free it."""
        if self.data is not None:
            self.ledger.release(self.data.numel() * self.data.element_size())
        self.data, self.length, self.seen = None, 0, 0
