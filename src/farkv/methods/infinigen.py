"""InfiniGen: speculate one layer ahead which records attention will need, fetch only those.

The steps, in the paper's order (docs/papers/infinigen.md has equation, function and deviation):
  once per model     skew: a basis in which few columns decide the scores     (`math.skew`, in the profile)
  once per prompt    index: partial keys of every token                       (`methods.indexed`, the coders below)
  every layer, step  speculate: score layer i's index with an estimated query (`engine.step`)
                     select: threshold and cap                                (`engine.choose`, `math.select`)
                     fetch: only the chosen records cross the link            (`store.tiers`)
                     attend, and top up what the true query finds missing     (`engine.step`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.calibrate.profile import Profile
from farkv.calibrate.skews import MAX_COLUMNS
from farkv.config import SOURCES, Source, check_counts, check_flag, check_fraction, check_name, is_number, show_value
from farkv.errors import ConfigError
from farkv.math.index import choose_columns, encode_keys, fit_scale, pack_codes, project_keys
from farkv.math.score import pool_group, pool_group_by_best, unpack_codes
from farkv.math.select import select_mass, select_mean_count, select_within
from farkv.math.skew import measure_gram, solve_bilinear, solve_safely, solve_svd
from farkv.methods.base import LEAST_RECORDS, Cap, Place
from farkv.methods.coder import Coder
from farkv.methods.indexed import IndexRule
from farkv.store.near.index import Projection

# Index bytes scored per step over the KV bytes, in one pass over the index.
INDEX_SHARE = 1 / 32


@dataclass(frozen=True, kw_only=True)
class InfiniGen:
    """Attend to the records that a query estimated one layer ahead finds in a small index.

    Args:
        fraction: hard cap on the read fraction over all layers; 1.0 reads everything and equals the plain model.
            Left out, it is 0.1 (the paper's: 0.2) but never fewer than 64 records: a short text is read whole.
        paper: the published algorithm; it decides what the following are where they are left out.
        source: the hidden state the query is estimated from: `post_attn`, LN_i(h + attn_{i-1}), is ours;
            `residual`, LN_i(h_{i-1}); `attn`, layer i-1's attention input, is the paper's; `query`: nothing is
            estimated or fetched ahead, the layer's own query chooses.
        columns: index columns R per KV head (ours: as many as fill 1/32 of the KV bytes; the paper's: 0.3 of
            the head dimension).
        index_bits: bits of an index entry, 4 (ours) or 8; the paper's partial keys have the model's dtype.
        alpha: read only records within `alpha` logits of the best one (the paper's: 4).
        top_p: read only the records that hold this share of the estimated attention weight.
        sinks: first tokens that are always read (ours: 4, the paper's: 0).
        window: recent tokens that are always read; with sinks at most a quarter of the cap (ours: 16, the paper's: 0).
        top_up: share of the cap that is chosen late, by the layer's true query (ours: 0.25, the paper's: 0).
    """

    fraction: float | None = None
    paper: bool = False
    source: Source | None = None
    columns: int | None = None
    index_bits: int | None = None
    alpha: float | None = None
    top_p: float | None = None
    sinks: int | None = None
    window: int | None = None
    top_up: float | None = None

    def __post_init__(self) -> None:
        check_flag(paper=self.paper)
        cap = self.cap
        check_fraction(cap.fraction)
        if self.source is not None:
            check_name("source", self.source, SOURCES)
        check_counts(sinks=cap.sinks, window=cap.window)
        if self.columns is not None:
            check_counts(1, columns=self.columns)
        bits = self.index_bits
        if bits is not None and (self.paper or type(bits) is not int or bits not in (4, 8)):
            raise ConfigError(f"index_bits: expected 4 or 8, and none with paper=True; got {show_value(bits)}")
        if self.alpha is not None and not (is_number(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha: expected a positive number of logits, got {show_value(self.alpha)}")
        if self.top_p is not None and (self.paper or self.alpha is not None):
            raise ConfigError("alpha and top_p: give one of them, got both")
        if self.top_p is not None:
            check_fraction(self.top_p, "top_p")
        if not is_number(cap.top_up) or not 0 <= cap.top_up < 1:
            raise ConfigError(f"top_up: expected a share in [0, 1), got {show_value(self.top_up)}")

    # --- after defaults are filled in ---------------------------------------------------------------------------

    @property
    def cap(self) -> Cap:
        """How much is read."""
        fraction, sinks, window, top_up = (0.2, 0, 0, 0.0) if self.paper else (0.1, 4, 16, 0.25)
        return Cap(
            fraction if self.fraction is None else self.fraction,
            sinks if self.sinks is None else self.sinks,
            window if self.window is None else self.window,
            top_up if self.top_up is None else self.top_up,
            LEAST_RECORDS if self.fraction is None else 1,
        )

    @property
    def index_rule(self) -> IndexRule:
        """How the index is made and used."""
        alpha = 4.0 if self.paper and self.alpha is None else self.alpha
        rule: Any = None
        if alpha is not None:
            rule = partial(select_by_alpha, alpha=alpha, mean=self.paper)
        elif self.top_p is not None:
            rule = partial(select_by_mass, top_p=self.top_p)
        return IndexRule(
            self.cap,
            self.make_coder,
            source=self.source or ("attn" if self.paper else "post_attn"),
            always_ahead=self.paper,
            rule=rule,
            pool=pool_group if alpha is None else pool_group_by_best,
            dense_first=self.paper,
        )

    def make_coder(self, place: Place) -> Coder:
        """Return what makes the index in a place."""
        # A light profile has curves alone: the skew is then the prompt's.
        profile = place.profile if place.profile is not None and place.profile.has_skew else None
        if self.paper:
            return PaperCoder(self.columns, profile, place.on_fallback)
        return BilinearCoder(self.columns, self.index_bits or 4, profile, place.on_fallback)

    def share_beside_dense(self, n_layers: int) -> float:
        """Return the fraction left to other layers where the first of `n_layers` reads everything.

        Raises:
            ConfigError: the dense layer alone passes the cap.
        """
        fraction = self.cap.fraction
        if fraction >= 1:
            return 1.0
        share = (fraction * n_layers - 1) / max(1, n_layers - 1)
        if share <= 0:
            raise ConfigError(
                f"fraction: paper=True reads 1 of {n_layers} layers whole, so the cap must be above "
                f"{1 / n_layers:.3f}, got {fraction}; raise it, or use paper=False"
            )
        return share


def select_by_alpha(scores: Tensor, cap: int, own: Tensor | None, *, alpha: float, mean: bool) -> Any:
    """Choose what is within `alpha` logits of the best; with `mean` the layer's mean count of it, as published."""
    return (select_mean_count if mean else select_within)(scores, cap, alpha, own)


def select_by_mass(scores: Tensor, cap: int, own: Tensor | None, *, top_p: float) -> Any:
    """Choose the fewest that hold `top_p` of the estimated attention weight."""
    return select_mass(scores, cap, top_p, own)


class BilinearCoder:
    """Ours: the best rank-R score from the profile, or from a prompt's queries and keys, in four or eight bits."""

    drifts = True

    def __init__(self, columns: int | None, bits: int, profile: Profile | None, on_fallback: Callable[[str], None]):
        self.columns, self.bits, self.profile, self.on_fallback = columns, bits, profile, on_fallback
        self.needs_queries = self.fits_skew = profile is None
        self.is_settled = profile is not None

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """Return as many columns as fill 1/32 of the KV bytes; where two codes share a byte, an even number."""
        wanted = int(INDEX_SHARE * record_bytes * 8 / self.bits) if self.columns is None else self.columns
        even = wanted - wanted % 2 if self.bits == 4 else wanted
        # A profile holds only the leading columns.
        return max(2 if self.bits == 4 else 1, min(even, k_dim - k_dim % 2, MAX_COLUMNS))

    def fit(
        self, layer: int, queries: Tensor | None, keys: Float[Tensor, "B Hkv N D"], valid: Tensor | None, n_columns: int
    ) -> Projection:
        """Return the leading columns of the bilinear skew, and the step of each column's codes.

        The skew is the profile's, until the text has drifted away from it: then there are queries.
        """
        if queries is None:
            assert self.profile is not None
            query, key, mean = (t.to(keys.device) for t in self.profile.bilinear(layer))
        else:
            (query, key, mean), unskewed = solve_safely(measure_gram(queries, keys, valid), solve_bilinear)
            if unskewed:
                self.on_fallback("identity_skew")
        # Kernels read them as they lie.
        query, key = query[..., :n_columns].contiguous(), key[..., :n_columns].contiguous()
        return Projection(query, key, mean, fit_scale(project_keys(keys, key, mean), valid, self.bits))

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return rounded projections."""
        codes = encode_keys(project_keys(keys, projection.key, projection.mean), projection.scale, self.bits)
        return pack_codes(codes) if self.bits == 4 else codes

    def unpack(self, codes: Tensor) -> Tensor:
        """Return codes with one column each."""
        return unpack_codes(codes) if self.bits == 4 else codes

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "bilinear", "columns": self.columns, "bits": self.bits}


class PaperCoder:
    """The paper's: an orthogonal skew, the strongest columns of this prompt, keys in the model's dtype."""

    bits = 0
    needs_queries = True
    # As published: what is generated changes no index.
    drifts = False

    def __init__(self, columns: int | None, profile: Profile | None, on_fallback: Callable[[str], None]):
        self.columns, self.profile, self.on_fallback = columns, profile, on_fallback
        self.fits_skew, self.is_settled = profile is None, profile is not None

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """Return 0.3 of the head dimension."""
        wanted = max(1, round(0.3 * k_dim)) if self.columns is None else self.columns
        return max(1, min(wanted, k_dim))

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        n_columns: int,
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
        key = choose_columns(queries.reshape(batch, heads, -1, dim), keys, skew, n_columns)
        zero = torch.zeros(batch, heads, 1, dim, device=keys.device)
        return Projection(key, key, zero, torch.ones(batch, heads, 1, n_columns, device=keys.device))

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return partial keys."""
        return project_keys(keys, projection.key, projection.mean).to(keys.dtype)

    def unpack(self, codes: Tensor) -> Tensor:
        """Return them as they are."""
        return codes

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        return {"kind": "paper", "columns": self.columns, "bits": self.bits}
