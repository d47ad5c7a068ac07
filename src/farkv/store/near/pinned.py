"""Records of a layer that a plan pins near for the whole answer, so that fetches skip them.

In: rows and their positions in the pool. Out: the slots of their copies. Copies are charged to the near ledger, the
table of slots to the pool's ledger.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger

# Per record of the pool: the slot of its copy, int32.
SLOT_BYTES = 4


class Pinned:
    """Pinned records of one layer: their rows, and for every pool row the slot of its copy, -1 without one."""

    def __init__(self, near: Ledger, device: torch.device, home: Ledger, home_device: torch.device):
        self.rows = Rows(near, device=device)
        self.slots = Rows(home, device=home_device)

    def pin(self, rows: Tensor, positions: Int[Tensor, "B Hkv K"], size: tuple[int, int]) -> None:
        """Pin copies of the rows at `positions` of the pool, in place of those pinned before.

        Args:
            size: rows of the pool, and its capacity.
        """
        self.clear()
        batch, heads, n = positions.shape
        self.rows.reserve = n
        # A deliberate copy over the link, once per prompt and layer.
        self.rows.append(rows)
        slots = torch.full((batch, heads, size[0]), -1, dtype=torch.int32, device=positions.device)
        slots.scatter_(-1, positions, torch.arange(n, dtype=torch.int32, device=slots.device).expand(batch, heads, n))
        # It grows when the pool does: admission counts on it.
        self.slots.reserve = size[1]
        self.slots.append(slots[..., None])

    def append(self, n: int) -> None:
        """Add `n` new pool rows, none of them pinned."""
        if self.slots.data is not None:
            batch, heads = self.slots.data.shape[:2]
            self.slots.append(torch.full((batch, heads, n, 1), -1, dtype=torch.int32, device=self.slots.device))

    def find(self, positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, "B Hkv K"] | None:
        """Return the slots of the records at `positions`, -1 where they are not pinned; None where none is."""
        if self.slots.data is None:
            return None
        return self.slots.view()[..., 0].gather(-1, positions).long()

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction from the pool; pinned copies of evicted records stay, unused."""
        if self.slots.data is not None:
            self.slots.keep(positions.to(self.slots.device))

    def crop(self, now: Cropped) -> None:
        """Remove the newest pool rows."""
        self.slots.cut(now.length)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.rows.select(sequences)
        self.slots.select(sequences)

    def clear(self) -> None:
        """Free both."""
        self.rows.clear()
        self.slots.clear()
