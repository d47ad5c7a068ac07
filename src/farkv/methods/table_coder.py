"""Our indexes: a prompt's keys, coded in nibbles by learned tables; or the best columns for its scores, in even steps.

Both skew by the prompt itself: a skew that was measured on other texts loses to it on real models, at every fraction
(docs/decisions/0020-nibble-tables.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.calibrate.skews import MAX_COLUMNS
from farkv.math.index import fit_scale, project_keys
from farkv.math.sample import thin_keys
from farkv.math.skew import measure_gram, solve_bilinear, solve_safely, solve_white
from farkv.math.tables import step_tables, weigh_keys
from farkv.methods.coder import IndexSize, Nibbles
from farkv.store.near.index import Projection, sample_none

# Columns of a group, at most: a wider one knows more of how columns go together, and takes longer to code.
WIDEST = 64
# Keys that tables are learned from, and queries of every head that say how much each key counts, at most.
LEARNED_KEYS, ASKED_QUERIES = 1024, 64


def fit_skew(
    queries: Tensor, keys: Tensor, valid: Tensor | None, n_columns: int, on_fallback: Callable[[str], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading columns of the prompt's bilinear skew, and the keys' mean."""
    (query, key, mean), unskewed = solve_safely(measure_gram(queries, keys, valid), solve_bilinear)
    if unskewed:
        on_fallback("identity_skew")
    # Kernels read them as they lie.
    return query[..., :n_columns].contiguous(), key[..., :n_columns].contiguous(), mean


class TableCoder:
    """Learned tables: all columns, in groups of at most 64, each coded by nibbles one after the other.

    Args:
        share: index bytes over the KV bytes.
    """

    needs_queries = takes_logits = drifts = True
    fits_skew = is_settled = False

    def __init__(self, share: float, device: torch.device, on_fallback: Callable[[str], None]):
        self.share, self.on_fallback = share, on_fallback
        self.nibbles = Nibbles(device)
        self.encode, self.decode = self.nibbles.encode, self.nibbles.decode

    def measure(self, k_dim: int, record_bytes: int) -> IndexSize:
        """Return groups of all columns but a remainder, and nibbles to fill the share: at most one for two columns."""
        groups = -(-k_dim // WIDEST)
        wanted = min(int(self.share * record_bytes * 2), k_dim // 2)
        # Two nibbles to a byte.
        stages = max(1, wanted // groups)
        if groups * stages % 2:
            stages = max(2, stages - 1)
        return IndexSize(k_dim // groups * groups, groups * stages, k_dim // groups)

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Return columns in which an error counts alike, dealt to groups, and each group's tables."""
        assert queries is not None
        (query, key, mean), unskewed = solve_safely(measure_gram(queries, keys, valid), solve_white)
        if unskewed:
            self.on_fallback("identity_skew")
        n_groups = size.columns // size.width
        dealt = torch.arange(size.columns, device=keys.device).view(-1, n_groups).T.reshape(-1)
        # Kernels read them as they lie.
        query, key = query[..., dealt].contiguous(), key[..., dealt].contiguous()
        sample, real = thin_keys(keys, valid, LEARNED_KEYS)
        asked = queries[:, :, :: -(-queries.shape[2] // ASKED_QUERIES)].reshape(*keys.shape[:2], -1, keys.shape[3])
        weights = weigh_keys(asked, sample, real)
        tables = self.nibbles.learn(project_keys(sample, key, mean), weights, size)
        return Projection(query, key, mean, tables, sample_none(keys))

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "tables", "share": self.share}


class StepCoder:
    """Even steps: the leading columns, each in four or eight bits.

    Args:
        columns: None: as many as fill `share` of the KV bytes.
    """

    needs_queries = takes_logits = drifts = True
    fits_skew = is_settled = False

    def __init__(
        self, columns: int | None, bits: int, share: float, device: torch.device, on_fallback: Callable[[str], None]
    ):
        self.columns, self.bits, self.share, self.on_fallback = columns, bits, share, on_fallback
        nibbles = Nibbles(device)
        self.encode, self.decode = nibbles.encode, nibbles.decode

    def measure(self, k_dim: int, record_bytes: int) -> IndexSize:
        """Return the columns; where two codes share a byte, an even number."""
        wanted = int(self.share * record_bytes * 8 / self.bits) if self.columns is None else self.columns
        even = wanted - wanted % 2 if self.bits == 4 else wanted
        columns = max(2 if self.bits == 4 else 1, min(even, k_dim - k_dim % 2, MAX_COLUMNS))
        return IndexSize(columns, columns * self.bits // 4, 1)

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Return the skew's leading columns, and the tables of their steps."""
        assert queries is not None
        query, key, mean = fit_skew(queries, keys, valid, size.columns, self.on_fallback)
        scale = fit_scale(project_keys(keys, key, mean), valid, self.bits)
        return Projection(query, key, mean, step_tables(scale, self.bits), sample_none(keys))

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "steps", "columns": self.columns, "bits": self.bits, "share": self.share}
