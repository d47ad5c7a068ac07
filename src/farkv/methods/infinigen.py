"""InfiniGen: speculate one layer ahead which records attention will need, fetch only those.

The steps, in the paper's order (docs/papers/infinigen.md has equation, function and deviation):
  once per model     skew: a basis in which few columns decide the scores     (`per_model.skew`, in the profile)
  once per prompt    index: partial keys of every token                       (`per_prompt.index`)
  every layer, step  speculate: score layer i's index with an estimated query (`per_token.speculate`)
                     select: threshold and cap                                (`per_token.select`)
                     fetch: only the chosen records cross the link            (`store.tiers`)
                     attend, and top up what the true query finds missing
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Tensor
from farkv.config import InfiniGen, Source
from farkv.errors import ConfigError
from farkv.methods.contract import Budget, Place, Query, Step
from farkv.methods.sparse import SparseRecipe
from farkv.per_model.profile import MAX_COLUMNS, Profile
from farkv.per_model.skew import measure_gram, solve_bilinear, solve_svd
from farkv.per_prompt.index import choose_columns, encode_keys, fit_scale, pack_codes, project_keys
from farkv.per_token.select import (
    Choice,
    forbid,
    force_sinks,
    select_mass,
    select_mean_count,
    select_rest,
    select_top,
    select_within,
)
from farkv.per_token.speculate import pool_group, pool_group_by_best, project_query, score_index, unpack_codes
from farkv.store.index import LayerIndex, Projection
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Fetch

# Without a profile, the skew is final once it was fitted to this many tokens per head dimension.
FIT_TOKENS_PER_DIM = 8
SAMPLED_QUERIES = 256
# Index bytes scored per step over the KV bytes, all passes over the index together.
INDEX_SHARE = 0.10
FIT_KEYS = 4096


class InfiniGenRecipe(SparseRecipe):
    """The published algorithm (`paper=True`) and the better default, in one order of steps."""

    def __init__(self, place: Place, config: InfiniGen, profile: Profile | None):
        super().__init__(
            place,
            fraction=config.need_fraction,
            sinks=config.sinks or 0,
            window=config.window or 0,
            top_up=config.top_up or 0.0,
        )
        # A light profile has curves alone: the skew is then the prompt's.
        self.config, self.profile = config, profile if profile is not None and profile.has_skew else None
        self.least = config.least_records
        # 0: the paper's partial keys are not rounded.
        self.bits = config.index_bits or 0
        self.query_source: Source | None = config.source
        self.index = {i: LayerIndex(self.store.index, place.device, place.limits.reserve_tokens) for i in place.layers}
        self.samples: dict[int, Tensor] = {}
        self.fitted_tokens: dict[int, int] = {}
        if config.paper:
            self.fraction = share_beside_dense(config.need_fraction, len(place.layers), 1)

    # --- once per prompt ------------------------------------------------------------------------------------

    def observe(self, layer: int, step: Step) -> None:
        """1. Sample queries.  2. Fit the projection, once there is enough.  3. Index the new keys."""
        if self.reads_all(layer):
            return
        index, total, n_new = self.index[layer], self.store.length(layer), step.k.shape[2]
        if not self.is_final(layer):
            self.sample_queries(layer, step.query.q)
        if index.projection is None and n_new > 1 and (self.profile or total >= self.fit_tokens(step.k)):
            keys = step.k if total == n_new else self.store.keys(layer)
            self.fit(layer, keys)
        if index.projection is not None and index.length == total - n_new:
            self.encode(layer, step.k)

    def fit_tokens(self, k: Tensor) -> int:
        """Tokens after which a skew from the prompt is final."""
        return FIT_TOKENS_PER_DIM * k.shape[-1]

    def is_final(self, layer: int) -> bool:
        """Say whether the layer's projection will not be fitted again."""
        fitted = self.fitted_tokens.get(layer, 0)
        # Once records are gone, those that are left do not stand for the prompt.
        enough = self.profile is not None or self.store.evicted[layer] > 0
        return fitted > 0 and (enough or fitted >= FIT_TOKENS_PER_DIM * self.store.k_dims[layer])

    def sample_queries(self, layer: int, q: Tensor) -> None:
        """Keep a thin sample of the queries seen so far, padding zeroed; a few hundred per layer."""
        valid = self.padding.of_tokens(self.store.seen(layer))
        if valid is not None:
            q = q * valid[:, None, -q.shape[2] :, None]
        old = self.samples.get(layer)
        both = q if old is None else torch.cat([old, q], 2)
        stride = -(-both.shape[2] // SAMPLED_QUERIES)
        self.samples[layer] = both[:, :, ::stride].clone()

    def fit(self, layer: int, keys: Tensor) -> None:
        """Decide how keys enter the layer's index, and clear it."""
        keys = keys.to(self.store.device)
        stride = -(-keys.shape[2] // FIT_KEYS)
        valid = self.padding.of_tokens(keys.shape[2])
        sample = keys[:, :, ::stride]
        sample_valid = None if valid is None else valid[:, ::stride]
        n_columns = self.count_columns(keys.shape[-1], self.account.record_bytes[layer])
        if self.config.paper:
            projection = self.fit_paper(layer, sample, sample_valid, n_columns)
        else:
            projection = self.fit_bilinear(layer, sample, sample_valid, n_columns)
        self.index[layer].clear()
        self.index[layer].projection = projection
        self.fitted_tokens[layer] = keys.shape[2]
        if self.profile is None:
            # Once per layer and fit: the receipt says where the skew came from.
            self.account.add_fallback("skew_from_prompt")
        if self.is_final(layer):
            self.samples.pop(layer, None)

    def fit_bilinear(self, layer: int, keys: Tensor, valid: Bool[Tensor, "B S"] | None, n: int) -> Projection:
        """Ours: the best rank-R score from the profile, or from this prompt's queries and keys."""
        if self.profile is not None:
            query, key, mean = (t.to(keys.device) for t in self.profile.bilinear(layer))
        else:
            query, key, mean = solve_bilinear(measure_gram(self.samples[layer], keys, valid))
        query, key = query[..., :n], key[..., :n]
        return Projection(query, key, mean, fit_scale(project_keys(keys, key, mean), valid, self.bits))

    def fit_paper(self, layer: int, keys: Tensor, valid: Bool[Tensor, "B S"] | None, n: int) -> Projection:
        """The paper's: an orthogonal skew, the strongest columns of this prompt, keys in the model's dtype."""
        batch, heads, _, dim = keys.shape
        queries = self.samples[layer]
        if self.profile is not None:
            skew = self.profile.svd(layer).to(keys.device)
        else:
            skew = solve_svd(measure_gram(queries, keys, valid))
        key = choose_columns(queries.reshape(batch, heads, -1, dim), keys, skew, n)
        zero = torch.zeros(batch, heads, 1, dim, device=keys.device)
        return Projection(key, key, zero, torch.ones(batch, heads, 1, n, device=keys.device))

    def encode(self, layer: int, keys: Tensor) -> None:
        """Append the codes of new keys to the layer's index."""
        projection = self.index[layer].projection
        assert projection is not None
        projected = project_keys(keys, projection.key, projection.mean)
        if self.config.paper:
            self.index[layer].append(projected.to(keys.dtype))
        else:
            codes = encode_keys(projected, projection.scale, self.bits)
            self.index[layer].append(pack_codes(codes) if self.bits == 4 else codes)

    def catch_up(self, layer: int, n_tokens: int) -> None:
        """Bring a layer's index up to `n_tokens`: after a short prompt, or while the skew is still young."""
        index = self.index[layer]
        fitted = self.fitted_tokens.get(layer, 0)
        young = not self.is_final(layer) and n_tokens >= 2 * fitted
        if young:
            self.fit(layer, self.store.keys(layer, 0, n_tokens))
        if index.length < n_tokens:
            # A deliberate copy where the pool is far: these keys were stored before the index could be built.
            self.encode(layer, self.store.keys(layer, index.length, n_tokens).to(self.store.device))

    # --- every layer, every step ----------------------------------------------------------------------------

    def reads_all(self, layer: int) -> bool:
        """The paper leaves the first layer dense; ours knows its true query."""
        return self.config.paper and layer == self.layers[0]

    def wants_estimate(self, layer: int) -> bool:
        """Every sparse layer with records is speculated."""
        return not self.dense and not self.reads_all(layer) and self.store.length(layer) > 0

    def speculate(self, layer: int, estimate: Query) -> None:
        """1. Score the index.  2. Select.  3. Start the fetch; it travels while layer i-1 goes on."""
        budget = self.share(self.store.seen(layer) + 1, layer)
        chosen = self.score_and_select(layer, estimate, self.store.length(layer) + 1, budget)
        early = self.store.fetch(layer, chosen.positions, chosen.valid, budget.late + budget.tail)
        self.pending[layer] = early, budget

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """The first layer: its true query is known at once."""
        return self.score_and_select(layer, query, self.store.length(layer), budget)

    def score_and_select(self, layer: int, query: Query, rows: int, budget: Budget) -> Choice:
        """Choose `budget.early` of `rows` records, the newest and not yet indexed one included, but for the tail."""
        self.catch_up(layer, rows - 1)
        scores = self.score(layer, query, rows - budget.tail)
        return self.select_records(layer, scores, budget)

    def score(self, layer: int, query: Query, n_old: int) -> Tensor:
        """Score the first `n_old` records of a layer with its index."""
        index = self.index[layer]
        assert index.projection is not None
        codes = index.codes()[:, :, :n_old]
        self.count_index(layer, codes.numel() * codes.element_size())
        codes = unpack_codes(codes) if self.bits == 4 else codes
        projected = project_query(query.q, index.projection.query, index.projection.scale, query.scaling)
        return score_index(projected, codes, query.softcap)

    def select_records(self, layer: int, scores: Tensor, budget: Budget) -> Choice:
        """Apply the configured rule: the cap alone, alpha, the paper's mean count, or a share of mass."""
        config, cap, own = self.config, budget.early, budget.own_early
        valid, recent = self.find_open(layer, scores.shape[-1], budget)
        pool = pool_group if config.alpha is None else pool_group_by_best
        pooled = force_sinks(pool(scores, valid), budget.own_sinks, valid, recent)
        if self.fraction >= 1 or cap == 0 or (config.alpha is None and config.top_p is None):
            return self.pick(layer, pooled, budget)
        pooled = self.reach(layer, pooled)
        if config.top_p is not None:
            return select_mass(pooled, cap, config.top_p, own)
        assert config.alpha is not None
        return (select_mean_count if config.paper else select_within)(pooled, cap, config.alpha, own)

    def top_up(self, layer: int, query: Query, early: Fetch, budget: Budget) -> Choice | None:
        """Miss correction: score again with the true query, fetch the best of what speculation left out."""
        if budget.late == 0:
            return None
        n_old = self.store.length(layer) - budget.tail
        valid, _ = self.find_open(layer, n_old, budget)
        pooled, taken = pool_group(self.score(layer, query, n_old), valid), Choice(early.positions, early.valid)
        if valid is not None or self.reaches_disk(layer):
            # Of the disk a late read has to be waited for: as few pages as its share of the cap.
            return select_rest(self.reach(layer, pooled, self.share_late), taken, budget.late, budget.own_late)
        return select_top(forbid(pooled, taken), budget.late)

    def take_fitted(self, layer: int, fitted: Tensor) -> None:
        """Note on how many tokens a saved index's projection was fitted."""
        self.fitted_tokens[layer] = int(fitted)

    # --- sizes and the batch --------------------------------------------------------------------------------

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """Index columns R: ours fill an index fraction of 0.10, the paper's are 0.3 of the head dimension."""
        if self.config.columns is not None:
            wanted = self.config.columns
        elif self.config.paper:
            wanted = max(1, round(0.3 * k_dim))
        else:
            scans = 2 if self.share_late else 1
            wanted = int(INDEX_SHARE * record_bytes * 8 / self.bits / scans)
        # Two codes share a byte.
        even = wanted - wanted % 2 if self.bits == 4 else wanted
        # A profile holds every column of the paper's basis, but only the leading ones of ours.
        most = k_dim if self.config.paper else min(k_dim - k_dim % 2, MAX_COLUMNS)
        return max(2 if self.bits == 4 else 1, min(even, most))

    def index_token_bytes(self, shape: LayerShape) -> int:
        """Bytes one token adds to a layer's index."""
        bits = self.bits or 8 * shape.itemsize
        return shape.batch * shape.kv_heads * self.count_columns(shape.k_dim, shape.record_bytes) * bits // 8

    def forget(self, layer: int, positions: Tensor) -> None:
        """Follow an eviction in the index, which is brought up to date first, while all keys are there."""
        if not self.reads_all(layer):
            self.catch_up(layer, self.store.length(layer))
            self.index[layer].keep(positions)

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest tokens, in the index too."""
        super().crop(n_tokens, layer)
        excess = self.index[layer].length - self.store.length(layer)
        if excess > 0:
            self.index[layer].crop(excess)

    def select(self, sequences: Tensor, layer: int) -> None:
        """Keep these sequences, in the index and the samples too."""
        super().select(sequences, layer)
        self.index[layer].select(sequences)
        if layer in self.samples:
            self.samples[layer] = self.samples[layer].index_select(0, sequences.to(self.samples[layer].device))

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        super().clear(layer)
        self.index[layer].clear()
        self.samples.pop(layer, None)
        self.fitted_tokens.pop(layer, None)


def share_beside_dense(fraction: float, n_layers: int, n_dense: int) -> float:
    """Return the fraction left to sparse layers where `n_dense` of `n_layers` read everything.

    Raises:
        ConfigError: the dense layers alone pass the cap.
    """
    if fraction >= 1:
        return 1.0
    share = (fraction * n_layers - n_dense) / max(1, n_layers - n_dense)
    if share <= 0:
        raise ConfigError(
            f"fraction: paper=True reads {n_dense} of {n_layers} layers whole, so the cap must be above "
            f"{n_dense / n_layers:.3f}, got {fraction}; raise it, or use paper=False"
        )
    return share
