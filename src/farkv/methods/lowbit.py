"""Low-bit keys: a copy of all key columns at few bits is scored with the true query; the best records are read.

The index is InfiniGen's without a skew: every column, each with a step of its own (docs/papers/baselines.md has
equation, function and deviation). Nothing is speculated: the query is the layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.config import check_counts, check_fraction, show_value
from farkv.errors import ConfigError
from farkv.math.index import fit_levels, fit_scale, measure_mean, project_keys
from farkv.math.tables import level_tables, step_tables
from farkv.methods.base import Cap, Place
from farkv.methods.coder import Coder, IndexSize, Nibbles
from farkv.methods.indexed import IndexRule
from farkv.store.near.index import Projection, sample_none


@dataclass(frozen=True, kw_only=True)
class LowBit:
    """Attend to the records that the true query finds in a copy of all key columns at few bits (YAKV's kind).

    Args:
        fraction: hard cap on the KV bytes read per step.
        bits: of one column of one key, 2 or 4.
        sinks, window: first and recent tokens that are always read.
    """

    fraction: float = 0.1
    bits: int = 2
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)
        if type(self.bits) is not int or self.bits not in (2, 4):
            raise ConfigError(f"bits: expected 2 or 4, got {show_value(self.bits)}")

    @property
    def index_rule(self) -> IndexRule:
        """How the index is made and used."""
        return IndexRule(Cap(self.fraction, self.sinks, self.window), self.make_coder)

    def make_coder(self, place: Place) -> Coder:
        """Return what makes the index."""
        return ColumnCoder(self.bits, place.device)


class ColumnCoder:
    """Every column as it is, less its mean, which moves all scores of a query alike."""

    needs_queries = takes_logits = fits_skew = is_settled = False
    drifts = True

    def __init__(self, bits: int, device: torch.device):
        self.bits = bits
        nibbles = Nibbles(device)
        self.encode, self.decode = nibbles.encode, nibbles.decode

    def measure(self, k_dim: int, record_bytes: int) -> IndexSize:
        """Return all columns, and as many zeros as fill the last byte."""
        codes = 8 // self.bits
        columns = -(-k_dim // codes) * codes
        return IndexSize(columns, columns * self.bits // 4, 4 // self.bits)

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Return the columns' means and steps: they follow from the keys alone."""
        columns = torch.eye(keys.shape[3], size.columns, device=keys.device, dtype=torch.float32).repeat(
            *keys.shape[:2], 1, 1
        )
        mean = measure_mean(keys, valid)
        projected = project_keys(keys, columns, mean)
        if self.bits == 2:
            return Projection(columns, columns, mean, level_tables(fit_levels(projected, valid)), sample_none(keys))
        return Projection(columns, columns, mean, step_tables(fit_scale(projected, valid, 4), 4), sample_none(keys))

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "columns", "bits": self.bits}
