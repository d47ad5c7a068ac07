"""The oracle: the records with the largest true attention weight. It reads every key, so it saves nothing.

Its `index_fraction` counts those keys; it is the upper bound of what choosing by weight can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.config import check_counts, check_fraction
from farkv.math.score import pool_group, score_keys
from farkv.math.step import Query
from farkv.methods.base import Records, Selector


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Attend to the records with the largest true attention weight: the ceiling; it reads every key."""

    fraction: float = 0.1
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)


class OracleSelector(Selector):
    """Reads sinks, the window and the best records by the true query against the full keys."""

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """1. True logits over all keys, where they are stored.  2. Join the query group."""
        shape, q = records.shape, query.q
        scores = torch.empty(
            shape.batch, shape.kv_heads, q.shape[1] // shape.kv_heads, 0, device=q.device, dtype=torch.float32
        )
        if n_rows:
            blocks = records.key_blocks(0, n_rows)
            scores = torch.cat([score_keys(q.to(keys.device), keys, query.logits) for keys in blocks], -1)
        return pool_group(scores.to(q.device), visible)

    def count_scored_bytes(self, records: Records, n_rows: int) -> int:
        """Every key is read."""
        shape = records.shape
        return shape.batch * shape.kv_heads * n_rows * shape.k_dim * shape.itemsize
