"""Near memory where it is a tier of its own: two fetch buffers in turn, each layer's recent window, and held records.

In: rows. Out: places to fetch into, the window's rows, and which records need not be fetched. Everything is charged
to the near ledger; where a held record stands, to the pool's.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger


class Buffers:
    """Two row buffers used in turn by consecutive layers, so that one is filled while the other is read."""

    def __init__(self, ledger: Ledger, device: torch.device):
        self.ledger, self.device = ledger, device
        self._areas: list[Tensor | None] = [None, None]

    def take(self, turn: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """Return the buffer of this turn as [B, Hkv, K, W]; it grows only with the context."""
        n = shape[0] * shape[1] * shape[2] * shape[3]
        area = self._areas[turn]
        if area is None or area.numel() < n or area.dtype != dtype:
            if area is not None:
                self._areas[turn] = None
                self.ledger.release(area.numel() * area.element_size())
            self.ledger.charge(n * torch.empty((), dtype=dtype).element_size())
            # Zeros, not garbage: a row that was never fetched is masked, and 0 * NaN would not be.
            area = torch.zeros(n, dtype=dtype, device=self.device)
            self._areas[turn] = area
        return area[:n].view(shape)

    def clear(self) -> None:
        """Free both."""
        for area in self._areas:
            if area is not None:
                self.ledger.release(area.numel() * area.element_size())
        self._areas = [None, None]


class Tail:
    """The newest records of one layer, near: [B, Hkv, up to 2n, W], slid to the front when full."""

    def __init__(self, ledger: Ledger, device: torch.device, n: int):
        self.ledger, self.device, self.n = ledger, device, n
        self.data: Tensor | None = None
        self.length = 0

    def push(self, *parts: Tensor) -> None:
        """Add new rows, whose parts lie side by side; only the last `n` are kept."""
        parts = tuple(part[:, :, -self.n :] for part in parts)
        batch, heads, n_new, _ = parts[0].shape
        if self.data is None:
            shape = (batch, heads, 2 * self.n, sum(part.shape[-1] for part in parts))
            self.ledger.charge(batch * heads * shape[2] * shape[3] * parts[0].element_size())
            self.data = torch.empty(shape, dtype=parts[0].dtype, device=self.device)
        if self.length + n_new > 2 * self.n:
            keep = min(self.n - n_new, self.length) if n_new < self.n else 0
            if keep:
                self.data[:, :, :keep] = self.data[:, :, self.length - keep : self.length].clone()
            self.length = keep
        at = 0
        for part in parts:
            self.data[:, :, self.length : self.length + n_new, at : at + part.shape[-1]] = part
            at += part.shape[-1]
        self.length += n_new

    def newest(self, n: int) -> Tensor | None:
        """Return the last `n` rows, [B, Hkv, n, W], or None where a crop has left fewer."""
        if self.data is None or self.length < n:
            return None
        return self.data[:, :, self.length - n : self.length]

    def crop(self, n_tokens: int) -> None:
        """Forget the newest rows."""
        self.length = max(0, self.length - n_tokens)

    def clear(self) -> None:
        """Free it."""
        if self.data is not None:
            self.ledger.release(self.data.numel() * self.data.element_size())
        self.data, self.length = None, 0


# The place of a held copy, int32, per record of the pool.
SLOT_BYTES = 4


class Held:
    """Records of one layer that stay near: their rows, and for every pool row the place of its copy, -1 without one."""

    def __init__(self, near: Ledger, device: torch.device, home: Ledger, home_device: torch.device):
        self.rows = Rows(near, device=device)
        self.slots = Rows(home, device=home_device)

    def hold(self, rows: Tensor, positions: Int[Tensor, "B Hkv K"], size: tuple[int, int]) -> None:
        """Copy the rows at `positions` of the pool near; they replace what was held before.

        Args:
            size: rows of the pool, and how many it has room for.
        """
        self.clear()
        batch, heads, n = positions.shape
        self.rows.reserve = n
        # A deliberate copy over the link, once per prompt and layer.
        self.rows.append(rows)
        slots = torch.full((batch, heads, size[0]), -1, dtype=torch.int32, device=positions.device)
        slots.scatter_(-1, positions, torch.arange(n, dtype=torch.int32, device=slots.device).expand(batch, heads, n))
        # It grows when the pool does, not before: only then is new memory admitted.
        self.slots.reserve = size[1]
        self.slots.append(slots[..., None])

    def append(self, n: int) -> None:
        """Note `n` new pool rows, none of them held."""
        if self.slots.data is not None:
            batch, heads = self.slots.data.shape[:2]
            self.slots.append(torch.full((batch, heads, n, 1), -1, dtype=torch.int32, device=self.slots.device))

    def find(self, positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, "B Hkv K"] | None:
        """Return where the records at `positions` are held, -1 where they are not; None where nothing is."""
        if self.slots.data is None:
            return None
        return self.slots.view()[..., 0].gather(-1, positions).long()

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction from the pool; a held copy of an evicted record is never asked for again."""
        if self.slots.data is not None:
            self.slots.keep(positions)

    def crop(self, n_tokens: int) -> None:
        """Forget the newest pool rows."""
        self.slots.crop(n_tokens)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.rows.select(sequences)
        self.slots.select(sequences)

    def clear(self) -> None:
        """Free both."""
        self.rows.clear()
        self.slots.clear()
