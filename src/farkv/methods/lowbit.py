"""Low-bit keys: a copy of all key columns at few bits is scored with the true query; the best records are read.

The index is InfiniGen's without a skew: every column, each with a step of its own (docs/papers/baselines.md has
equation, function and deviation). Nothing is speculated: the query is the layer's own.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.config import InfiniGen, LowBit, Source
from farkv.methods.contract import Place, Query
from farkv.methods.infinigen import InfiniGenRecipe
from farkv.per_prompt.index import encode_levels, fit_levels, fit_scale, measure_mean, pack_codes, project_keys
from farkv.per_token.speculate import project_query, score_index, unpack_codes
from farkv.store.index import Projection


class LowBitRecipe(InfiniGenRecipe):
    """Reads sinks, the window and the best records by the true query against keys at two or four bits."""

    fits_skew = False

    def __init__(self, place: Place, config: LowBit):
        index = InfiniGen(fraction=config.fraction, sinks=config.sinks, window=config.window, top_up=0.0)
        super().__init__(place, index, None)
        self.bits = config.bits
        self.query_source: Source | None = None

    # --- the index: every column ----------------------------------------------------------------------------

    def sample_queries(self, layer: int, q: Float[Tensor, "B Hq T D"]) -> None:
        """Steps follow from the keys alone."""

    def fit_bilinear(
        self, layer: int, queries: Tensor | None, keys: Tensor, valid: Bool[Tensor, "B S"] | None, n: int
    ) -> Projection:
        """Take every column as it is, less its mean, which moves all scores of a query alike."""
        columns = torch.eye(keys.shape[3], n, device=keys.device).repeat(*keys.shape[:2], 1, 1)
        mean = measure_mean(keys, valid)
        fit = fit_levels if self.bits == 2 else fit_scale
        return Projection(columns, columns, mean, fit(project_keys(keys, columns, mean), valid, self.bits))

    def make_codes(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return keys as the index holds them."""
        if self.bits == 4:
            return super().make_codes(keys, projection)
        levels = encode_levels(project_keys(keys, projection.key, projection.mean), projection.scale)
        return pack_codes(levels, 2)

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """All columns, and as many zeros as fill the last byte."""
        codes = 8 // self.bits
        return -(-k_dim // codes) * codes

    # --- every layer, every step ----------------------------------------------------------------------------

    def wants_estimate(self, layer: int) -> bool:
        """Nothing is speculated."""
        return False

    def may_select(self, layer: int, query: Query) -> bool:
        """The fast kernels know four bits."""
        return self.bits == 4 and super().may_select(layer, query)

    def score(self, layer: int, query: Query, n_old: int) -> Tensor:
        """Score the first `n_old` records of a layer with its index."""
        index = self.index[layer]
        if self.bits == 4:
            return super().score(layer, query, n_old)
        assert index.projection is not None
        codes = index.codes()[:, :, :n_old]
        self.count_index(layer, codes.numel() * codes.element_size())
        projected = project_query(query.q, index.projection.query, index.projection.scale, query.scaling)
        return score_index(projected, unpack_codes(codes, 2), query.softcap)
