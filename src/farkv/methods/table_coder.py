"""Our indexes: a prompt's keys, coded in nibbles by learned tables; or the best columns for its scores, in even steps.

Both skew by the prompt itself: a skew that was measured on other texts loses to it on real models, at every fraction
(docs/decisions/0020-nibble-tables.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.calibrate.skews import MAX_COLUMNS
from farkv.math.index import fit_scale, project_keys
from farkv.math.sample import thin_keys
from farkv.math.skew import measure_gram, solve_bilinear, solve_safely
from farkv.math.tables import step_tables, weigh_keys
from farkv.methods.coder import IndexSize, Nibbles
from farkv.store.near.index import Projection, sample_none

# Nibbles that code a group of columns, one after the other; columns of a group, at least and at most.
STAGES = 4
NARROWEST, WIDEST = 8, 32
# Keys that tables are learned from, and queries of every head that say how much each key counts, at most.
LEARNED_KEYS, ASKED_QUERIES = 2048, 64
# Of the widest column's spread, what the narrowest is taken for at least: queries are divided by it.
LEAST_SPREAD = 1e-4


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
    """Learned tables: all columns in groups, each coded by four nibbles, one after the other.

    The fewer nibbles there are, the wider are the groups: a rare key may lie in the columns that most keys do without.

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
        """Return as many groups as fill the share of the KV bytes, and as there are columns for."""
        wanted = int(self.share * record_bytes * 2) // STAGES
        groups = max(1, min(wanted, k_dim // NARROWEST))
        width = min(WIDEST, k_dim // groups)
        return IndexSize(groups * width, groups * STAGES, width)

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Return the skew's leading columns, dealt to groups, and each group's tables.

        Keys are scaled so that an error counts alike in every column: by the spread of the queries, which is the keys'.
        """
        assert queries is not None
        query, key, mean = fit_skew(queries, keys, valid, size.columns, self.on_fallback)
        n_groups = size.columns // size.width
        dealt = torch.arange(size.columns, device=keys.device).view(-1, n_groups).T.reshape(-1)
        query, key = query[..., dealt], key[..., dealt]
        sample, real = thin_keys(keys, valid, LEARNED_KEYS)
        spread = measure_spread(project_keys(sample, key, mean), real)
        query, key = (query / spread).contiguous(), (key * spread).contiguous()
        asked = queries[:, :, :: -(-queries.shape[2] // ASKED_QUERIES)].reshape(*keys.shape[:2], -1, keys.shape[3])
        weights = weigh_keys(asked, sample, real)
        tables = self.nibbles.learn(project_keys(sample, key, mean), weights, size)
        return Projection(query, key, mean, tables, sample_none(keys))

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "tables", "share": self.share}


def measure_spread(
    projected: Float32[Tensor, "B Hkv N R"], valid: Bool[Tensor, "B N"] | None
) -> Float32[Tensor, "B Hkv 1 R"]:
    """Return every column's root mean square, at least a ten-thousandth of the widest's; 1 where that is unknown."""
    square = projected.square()
    if valid is not None:
        square = square * valid[:, None, :, None]
    n = projected.shape[2] if valid is None else valid.sum(-1)[:, None, None, None].clamp_min(1)
    spread = (square.sum(2, keepdim=True) / n).sqrt()
    spread = torch.maximum(spread, spread.amax(-1, keepdim=True) * LEAST_SPREAD)
    return torch.where(spread.isfinite() & (spread > 0), spread, 1.0)


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
