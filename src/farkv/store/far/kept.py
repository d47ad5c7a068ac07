"""Metadata of the rows of a layer that evicts: each row's token and importance score.

In: positions that stay at an eviction. Out: the rows' tokens (their places in the context), which masks are looked up
with, and their scores. Both are charged to the ledger of the records.
"""

from __future__ import annotations

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.errors import CacheStateError
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger

# Per record: an int32 place and a bfloat16 score; with a float32 score.
ROW_BYTES = 6
EXACT_ROW_BYTES = 8


class Kept:
    """Place and score of every row of one layer, kept in step with its rows."""

    def __init__(self, ledger: Ledger, device: torch.device, *, exact: bool = False):
        self.dtype = torch.float32 if exact else torch.bfloat16
        self.places = Rows(ledger, device=device)
        self.scores = Rows(ledger, device=device)
        # Length of the run of rows at the end without a missing token: only those can be cropped.
        self.gapless = 0

    def append(self, like: Tensor, start: int) -> None:
        """Add the new tokens of `like`, [B, Hkv, T, ...], the first of which is token `start`."""
        batch, heads, n = like.shape[:3]
        device = self.places.device
        places = torch.arange(start, start + n, dtype=torch.int32, device=device)
        self.places.append(places.expand(batch, heads, n)[..., None])
        self.scores.append(torch.zeros(batch, heads, n, 1, dtype=self.dtype, device=device))
        self.gapless += n

    def put(self, places: Int[Tensor, "B Hkv K"], scores: Float32[Tensor, "B Hkv K"], gapless: int) -> None:
        """Add rows that were chosen before they were stored."""
        self.places.append(places[..., None].int())
        self.scores.append(scores[..., None].to(self.dtype))
        self.gapless = gapless

    def keep(self, positions: Int[Tensor, "B Hkv K"], scores: Float32[Tensor, "B Hkv K"], gapless: int) -> None:
        """Keep the rows at `positions`, with new scores."""
        self.places.keep(positions)
        self.scores.keep(positions)
        self.scores.view().copy_(scores[..., None])
        # After an earlier crop the run without a gap may be shorter than the caller assumes.
        self.gapless = min(gapless, self.gapless)

    def cut(self, length: int, evicted: int) -> None:
        """Forget all rows but the first `length`.

        Raises:
            CacheStateError: tokens before the others are gone.
        """
        n_tokens = max(0, self.places.length - length)
        if evicted and n_tokens > self.gapless:
            raise CacheStateError(
                f"crop: expected at most {self.gapless} tokens to take back, got {n_tokens}; what came before them "
                "was evicted; keep more (a larger window or fraction), or start a new cache"
            )
        self.gapless = max(0, self.gapless - n_tokens)
        self.places.cut(length)
        self.scores.cut(length)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.places.select(sequences)
        self.scores.select(sequences)

    def clear(self) -> None:
        """Free both."""
        self.places.clear()
        self.scores.clear()
        self.gapless = 0
