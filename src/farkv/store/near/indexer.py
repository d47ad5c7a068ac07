"""The keys of the indexer that a model was trained with, of one layer: near, and in the model's own form.

In: a pass's new keys, before its records are admitted. Out: the keys of all tokens. What a pass brings is stored where
there is room for it already, else once the pass is admitted (`settle`); a pass that is taken back leaves nothing.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Shaped, Tensor
from farkv.errors import CacheStateError
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger

# A model keeps three positions of every token: an image's have height and width. Of text they are the same.
PLACE_BYTES = 3 * 8


class IndexerKeys:
    """One layer's keys, [B, 1, S, R], and the positions of all tokens where the model keeps them with this layer."""

    def __init__(self, ledger: Ledger, device: torch.device, reserve: int):
        self.keys = Rows(ledger, device=device, reserve=reserve)
        self.places = Rows(ledger, device=device, reserve=reserve)
        # Of the pass that runs, until it is admitted.
        self.new_keys: Tensor | None = None
        self.new_places: Tensor | None = None

    def extend(self, new: Shaped[Tensor, "B T R"]) -> Shaped[Tensor, "B S R"]:
        """Take the keys of a pass's tokens; return those of all.

        Cost: without room for them, one copy of the layer's keys, which lasts as long as the model's indexer runs.
        """
        keys, n = self.keys, self.keys.length
        self.new_keys = None
        if n and n + new.shape[1] <= keys.capacity:
            keys.append(new.detach()[:, None])
            return keys.view()[:, 0]
        self.new_keys = new.detach()[:, None]
        return torch.cat([keys.view()[:, 0], new], 1) if n else new

    def get_keys(self, i: int) -> Shaped[Tensor, "1 S R"]:
        """Return the keys of sequence `i`, those of the pass that runs included."""
        parts = [self.keys.view()[i : i + 1, 0]] if self.keys.length else []
        return torch.cat(parts if self.new_keys is None else [*parts, self.new_keys[i : i + 1, 0]], 1)

    def get_places(self) -> Int[Tensor, "P B S"] | None:
        """Return the positions of all stored tokens; None where there are none."""
        return self.places.view()[:, 0].permute(2, 0, 1) if self.places.length else None

    def take_places(self, places: Int[Tensor, "P B S"]) -> None:
        """Take the positions of all tokens, those of the pass that runs included."""
        self.new_places = places[..., self.places.length :].permute(1, 2, 0)[:, None]

    def settle(self) -> None:
        """Store what the pass has brought: it is admitted."""
        for rows, new in ((self.keys, self.new_keys), (self.places, self.new_places)):
            if new is not None:
                rows.append(new)
        self.new_keys = self.new_places = None

    def join(self, other: IndexerKeys, length: int, batches: tuple[int, int]) -> None:
        """Append another's sequences to the batch, all with `length` rows; shorter ones get zeros before theirs."""
        for mine, theirs in ((self.keys, other.keys), (self.places, other.places)):
            if mine.length or theirs.length:
                mine.join(theirs, length, batches)

    # --- as a follower ----------------------------------------------------------------------------------------

    def crop(self, now: Cropped) -> None:
        """Remove the newest tokens, and what a pass brought that is taken back."""
        self.new_keys = self.new_places = None
        self.keys.cut(now.length)
        self.places.cut(now.length)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Refuse: the model chooses among all tokens, and all KV heads read the same ones.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError("indexer: expected all records to stay, got an eviction; leave evict out, or add a disk")

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.keys.select(sequences)
        self.places.select(sequences)

    def clear(self) -> None:
        """Free everything."""
        self.new_keys = self.new_places = None
        self.keys.clear()
        self.places.clear()
