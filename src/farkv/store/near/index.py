"""The near index of one layer: scored in place of the keys.

In: codes of new keys. Out: the stored codes, in place, and the projection of queries. Rows hold int8 codes (ours) or
the model's dtype (the paper's partial keys). Knows bytes; `math.index` has the maths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger


class Projection(NamedTuple):
    """How queries and keys are projected: score = (q @ query) . decode(codes), which is (k - mean) @ key to rounding.

    tables: what each value of each nibble stands for (math/tables.py); no rows where keys are not coded.
    sampled: 1 for a head whose records are drawn (math/sampling.py), 0 where the best are read. The batch axis of the
    others is 1 where all sequences share a profile.
    """

    query: Float32[Tensor, "b Hkv D R"]
    key: Float32[Tensor, "b Hkv D R"]
    mean: Float32[Tensor, "b Hkv 1 D"]
    tables: Float32[Tensor, "B Hkv Y W"]
    sampled: Float32[Tensor, "B Hkv 1 1"]


def sample_none(keys: Tensor) -> Float32[Tensor, "B Hkv 1 1"]:
    """Return zeros for every KV head: of all the best records are read."""
    return torch.zeros(*keys.shape[:2], 1, 1, device=keys.device, dtype=torch.float32)


class LayerIndex:
    """Codes of all tokens of one layer, and the projection they were made with."""

    def __init__(self, ledger: Ledger, device: torch.device, reserve: int):
        self.rows = Rows(ledger, device=device, reserve=reserve)
        self.projection: Projection | None = None

    @property
    def length(self) -> int:
        """Tokens indexed."""
        return self.rows.length

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's codes, all sequences and KV heads."""
        data = self.rows.data
        return 0 if data is None else data.shape[0] * data.shape[1] * data.shape[3] * data.element_size()

    def append(self, codes: Tensor, room: int = 0) -> None:
        """Add codes of new tokens, [B, Hkv, T, R]; make room for `room` tokens in all where more are to come."""
        if room:
            self.rows.ensure((codes.shape[0], codes.shape[1], room, codes.shape[3]), codes.dtype)
        self.rows.append(codes)

    def replace(self, new: Projection, sequences: Int[Tensor, " n"], batch: int) -> None:
        """Replace the projection of some of the `batch` sequences; the caller then rewrites their codes."""
        old = self.projection or Projection._make(torch.zeros_like(t[:1]) for t in new)
        self.projection = Projection._make(
            was.expand(batch, -1, -1, -1).index_copy(0, sequences, now.expand(len(sequences), -1, -1, -1))
            for was, now in zip(old, new, strict=True)
        )

    def mark(self, sequences: Int[Tensor, " n"], sampled: Float32[Tensor, "n Hkv 1 1"]) -> None:
        """Say of some sequences which heads' records are drawn."""
        assert self.projection is not None
        marked = self.projection.sampled.index_copy(0, sequences, sampled)
        self.projection = self.projection._replace(sampled=marked)

    def write(self, sequences: Int[Tensor, " n"], start: int, codes: Tensor) -> None:
        """Overwrite some sequences' codes, [n, Hkv, T, R], from token `start` on."""
        self.rows.read(start, start + codes.shape[2])[sequences] = codes

    def join(self, other: LayerIndex, length: int, batches: tuple[int, int]) -> None:
        """Append another's sequences to the batch, all with `length` codes; a missing projection becomes zeros."""
        known = [p for p in (self.projection, other.projection) if p is not None]
        if not known:
            return
        parts = [
            p or Projection._make(torch.zeros_like(t[:1]) for t in known[0])
            for p in (self.projection, other.projection)
        ]
        wide = [[t.expand(n, -1, -1, -1) for t in part] for part, n in zip(parts, batches, strict=True)]
        self.projection = Projection._make(torch.cat(pair) for pair in zip(*wide, strict=True))
        if self.length or other.length:
            self.rows.join(other.rows, length, batches)
        other.clear()

    def codes(self) -> Tensor:
        """Return all codes in place, [B, Hkv, S, R]."""
        return self.rows.view()

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the codes at these positions; all rows are indexed."""
        if self.rows.data is not None:
            self.rows.keep(positions.to(self.rows.device))

    def crop(self, now: Cropped) -> None:
        """Remove the newest tokens, as far as they are indexed."""
        self.rows.cut(now.length)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.rows.select(sequences)
        if self.projection is not None:
            *shared, tables, sampled = self.projection
            at = sequences.to(tables.device)
            # A batch axis of 1 is shared by all sequences; the others always have one row per sequence.
            shared = [p if p.shape[0] == 1 else p.index_select(0, at) for p in shared]
            self.projection = Projection._make([*shared, tables.index_select(0, at), sampled.index_select(0, at)])

    def clear(self) -> None:
        """Free everything."""
        self.rows.clear()
        self.projection = None
