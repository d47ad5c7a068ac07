"""The paper's index: an orthogonal skew, the strongest columns of this prompt, keys in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.calibrate.profile import Profile
from farkv.math.index import choose_columns, project_keys
from farkv.math.skew import measure_gram, solve_safely, solve_svd
from farkv.methods.coder import IndexSize
from farkv.store.near.index import Projection, sample_none


class PaperCoder:
    """Partial keys, as published."""

    needs_queries = True
    takes_logits = False
    # As published: what is generated changes no index.
    drifts = False

    def __init__(self, columns: int | None, profile: Profile | None, on_fallback: Callable[[str], None]):
        self.columns, self.profile, self.on_fallback = columns, profile, on_fallback
        self.fits_skew, self.is_settled = profile is None, profile is not None

    def measure(self, k_dim: int, record_bytes: int) -> IndexSize:
        """Return 0.3 of the head dimension, as numbers."""
        wanted = max(1, round(0.3 * k_dim)) if self.columns is None else self.columns
        return IndexSize(max(1, min(wanted, k_dim)), 0, 1)

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Return the skew's columns with the largest summed magnitude of this prompt's queries and keys."""
        assert queries is not None
        batch, heads, _, dim = keys.shape
        if self.profile is not None:
            skew = self.profile.svd(layer).to(keys.device)
        else:
            (skew,), unskewed = solve_safely(measure_gram(queries, keys, valid), lambda gram: (solve_svd(gram),))
            if unskewed:
                self.on_fallback("identity_skew")
        key = choose_columns(queries.reshape(batch, heads, -1, dim), keys, skew, size.columns)
        zero = torch.zeros(batch, heads, 1, dim, device=keys.device, dtype=torch.float32)
        return Projection(
            key, key, zero, torch.zeros(batch, heads, 0, 1, device=keys.device, dtype=torch.float32), sample_none(keys)
        )

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return partial keys."""
        return project_keys(keys, projection.key, projection.mean).to(keys.dtype)

    def decode(self, codes: Tensor, projection: Projection) -> Tensor:
        """Return them as they are."""
        return codes

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "paper", "columns": self.columns}
