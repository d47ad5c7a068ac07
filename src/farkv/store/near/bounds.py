"""The page bounds of one layer: scored in place of the keys where whole pages are chosen (Quest).

In: bounds of new keys. Out: the bounds of every page, the unfinished one included, in place. Knows bytes;
`math.bounds` has the maths.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger


class PageBounds:
    """One row per page: the minimum of every key coordinate, then the maxima."""

    def __init__(self, ledger: Ledger, device: torch.device, reserve: int, page: int):
        """Make the first allocation for `reserve` tokens."""
        self.rows = Rows(ledger, device=device, reserve=-(-reserve // page), row_tokens=page)
        self.page = page
        # Tokens that the bounds cover.
        self.length = 0

    @property
    def unfinished(self) -> int:
        """Return the number of tokens in the last page, 0 where it is full."""
        return self.length % self.page

    def append(self, bounds: Tensor, n_tokens: int) -> None:
        """Add bounds of `n_tokens` new tokens, [B, Hkv, P, 2D]; the first is merged into the unfinished page, if any.

        Cost: P rows written; when the capacity grows, one copy of all rows.
        """
        if self.unfinished:
            last, first = self.rows.view()[:, :, -1], bounds[:, :, 0]
            dim = last.shape[-1] // 2
            torch.minimum(last[..., :dim], first[..., :dim], out=last[..., :dim])
            torch.maximum(last[..., dim:], first[..., dim:], out=last[..., dim:])
            bounds = bounds[:, :, 1:]
        if bounds.shape[2]:
            self.rows.append(bounds)
        self.length += n_tokens

    def view(self, n_tokens: int) -> Tensor:
        """Return the bounds of the pages of the first `n_tokens`, in place, [B, Hkv, P, 2D]."""
        return self.rows.view()[:, :, : -(-n_tokens // self.page)]

    def crop(self, now: Cropped) -> None:
        """Remove the newest tokens, and the unfinished page: its bounds may still include them."""
        length = min(self.length, now.length)
        length -= length % self.page
        self.length, self.rows.length = length, length // self.page

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Remove everything: after an eviction records are on other pages."""
        self.clear()

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.rows.select(sequences)

    def clear(self) -> None:
        """Free everything."""
        self.rows.clear()
        self.length = 0
