"""InfiniGen's index, once per prompt: when a layer's projection is fitted, on what, and how new keys enter it.

Every sequence of a batch has a projection of its own, fitted to an even sample of all its own tokens, as if it were
alone and read in one pass. Where the prompt's length is announced it is fitted at the end; where it is not, a first
pass may be all of it, and what follows in further passes is fitted to when the index is next scored.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.config import InfiniGen, Source
from farkv.methods.contract import Place, Step
from farkv.methods.prompt_keys import FIT_KEYS, read_keys, sample_keys
from farkv.methods.sparse import SparseRecipe
from farkv.per_model.profile import MAX_COLUMNS, Profile
from farkv.per_model.skew import measure_gram, solve_bilinear, solve_svd
from farkv.per_prompt.index import choose_columns, encode_keys, fit_scale, pack_codes, project_keys
from farkv.per_prompt.sample import extend_sample, thin_keys, thin_queries, widen_stride
from farkv.store.index import LayerIndex, Projection
from farkv.store.sizes import LayerShape

# Without a profile, the skew is final once it was fitted to this many tokens per head dimension.
FIT_TOKENS_PER_DIM = 8
SAMPLED_QUERIES = 256
# Index bytes scored per step over the KV bytes, in one pass over the index.
INDEX_SHARE = 1 / 32
# A text that was scored is fitted to again once passes of several tokens have made it longer by half.
GROWTH = 1.5


class Indexed(SparseRecipe):
    """A recipe whose layers have an index."""

    # The projection is a skew, from the profile or else from the prompt.
    fits_skew = True

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
        if config.least_records > 1 and not self.store.travels:
            self.dense_tokens = place.fast.dense_tokens
        # 0: the paper's partial keys are not rounded.
        self.bits = config.index_bits or 0
        self.query_source: Source | None = config.source
        self.index = {i: LayerIndex(self.store.index, place.device, place.limits.reserve_tokens) for i in place.layers}
        # Queries of every sequence, one of `strides` tokens each; and the tokens that its projection was fitted to.
        self.samples: dict[int, Tensor] = {}
        self.strides: dict[int, list[int]] = {}
        self.fitted_tokens: dict[int, list[int]] = {}
        # Layers to which passes of several tokens have added since they were last scored, with their rows after the
        # last one; and of those layers the ones whose first pass was fitted to as if it were the whole prompt.
        self.grown: dict[int, int] = {}
        self.unscored: set[int] = set()

    # --- when -----------------------------------------------------------------------------------------------

    def observe(self, layer: int, step: Step) -> None:
        """1. Sample queries.  2. At the prompt's end fit the projection.  3. Index the new keys."""
        if self.reads_all(layer):
            return
        index, total, n_new = self.index[layer], self.store.length(layer), step.k.shape[2]
        # Once records are gone, those that are left do not stand for the prompt.
        grows = n_new > 1 and not self.store.evicted[layer]
        if grows:
            self.grown[layer] = total
            if layer in self.unscored or total == n_new:
                # What was fitted to was not the whole prompt.
                self.unscored.discard(layer)
                index.clear()
                self.fitted_tokens.pop(layer, None)
        if grows or not self.is_final(layer):
            self.sample_queries(layer, step.query.q)
        if grows and self.store.seen(layer) == (self.prompt_tokens or n_new):
            if not self.prompt_tokens:  # It may go on, in passes to come.
                self.unscored.add(layer)
            # Coded records are indexed as they are read.
            self.fit_due(layer, step.k if total == n_new and layer not in self.store.codecs else None)
        # In place, a token is indexed when it leaves the window, many at a time; of a far one the key is here now.
        waits = n_new == 1 and not self.store.travels and self.window > 0
        if index.projection is not None and index.length == total - n_new and not waits:
            self.encode(layer, step.k)

    def catch_up(self, layer: int, n_tokens: int) -> None:
        """Bring a layer's index up to `n_tokens` at least: what was read is fitted to, tokens have left the window."""
        self.unscored.discard(layer)
        if layer in self.grown:
            self.fit_due(layer, None)
        if not self.is_final(layer):
            self.fit_due(layer, None)
        done, total = self.index[layer].length, self.store.length(layer)
        for _, keys in read_keys(self.store, layer, done, total) if done < n_tokens else ():
            self.encode(layer, keys, total)

    def final_tokens(self, layer: int) -> int:
        """Return the tokens a projection must have been fitted to, not to be fitted again."""
        young = self.profile is None and not self.store.evicted[layer]
        return FIT_TOKENS_PER_DIM * self.store.k_dims[layer] if young else 1

    def is_final(self, layer: int) -> bool:
        """Say whether no sequence's projection will be fitted again."""
        fitted = self.fitted_tokens.get(layer)
        return fitted is not None and min(fitted) >= self.final_tokens(layer)

    def find_due(self, layer: int, n_rows: int) -> list[int]:
        """Return the sequences to be fitted now, by their own tokens and those they were fitted to before."""
        final, fitted = self.final_tokens(layer), self.get_fitted(layer)
        grown = layer in self.grown and not self.store.evicted[layer]
        pairs = enumerate(zip(self.count_own(layer, n_rows), fitted, strict=True))
        return [i for i, (n, old) in pairs if (old < final and n >= 2 * old) or (grown and n >= GROWTH * old)]

    def fit_due(self, layer: int, keys: Float[Tensor, "B Hkv S D"] | None) -> None:
        """Fit what is to be fitted to what was read, not to what follows it; `keys` are its own where they are near."""
        total = self.store.length(layer)
        n_rows = min(self.grown.get(layer, total), total)
        due = self.find_due(layer, n_rows)
        if due:
            self.fit(layer, keys, due, n_rows)
        if layer not in self.unscored:
            self.grown.pop(layer, None)
            for known in (self.samples, self.strides) if self.is_final(layer) else ():
                known.pop(layer, None)

    def get_fitted(self, layer: int) -> list[int]:
        """Return how many tokens each sequence's projection was fitted to; 0: there is none."""
        return self.fitted_tokens.setdefault(layer, [0] * self.store.batch(layer))

    def take_fitted(self, layer: int, fitted: Tensor) -> None:
        """Note on how many tokens a saved index's projection was fitted."""
        self.fitted_tokens[layer] = fitted.reshape(-1).tolist()

    def count_own(self, layer: int, n_rows: int) -> list[int]:
        """Return the real tokens of every sequence among a layer's first `n_rows`."""
        lengths = self.padding.count(n_rows + self.store.evicted[layer])
        own = [n_rows] if lengths is None else [min(n, n_rows) for n in lengths.real]
        return own if len(own) > 1 else own * self.store.batch(layer)

    # --- on what --------------------------------------------------------------------------------------------

    def sample_queries(self, layer: int, q: Float[Tensor, "B Hq T D"]) -> None:
        """Keep a thin sample of every sequence's queries so far; a few hundred per layer."""
        if self.profile is not None and not self.config.paper:
            return
        seen, n_new, evicted = self.store.seen(layer), q.shape[2], self.store.evicted[layer]
        before = self.count_own(layer, seen - n_new - evicted)
        after = self.count_own(layer, seen - evicted)
        was = self.strides.get(layer) or [widen_stride(1, n, SAMPLED_QUERIES) for n in before]
        strides = [widen_stride(s, n, SAMPLED_QUERIES) for s, n in zip(was, after, strict=True)]
        n_slots = max(1, *(-(-n // s) for n, s in zip(after, strides, strict=True)))
        old = self.samples.get(layer)
        if n_new == 1 and self.padding.real is None and old is not None and strides == was:
            # Without padding all sequences have as many tokens; of those, one in `stride` is sampled.
            if n_slots > old.shape[2]:
                self.samples[layer] = extend_sample(old, q, SAMPLED_QUERIES)
            return
        real = self.padding.of_tokens(seen)
        real = None if real is None else real[:, -n_new:].expand(q.shape[0], -1)
        tokens = torch.tensor([before, after, was, strides], device=q.device)
        self.samples[layer] = thin_queries(old, q, real, tokens, n_slots)
        self.strides[layer] = strides

    def fit(self, layer: int, keys: Float[Tensor, "B Hkv S D"] | None, due: list[int], n_rows: int) -> None:
        """Decide by `n_rows` rows how keys of the sequences `due` enter the layer's index, and code theirs anew."""
        index, queries = self.index[layer], self.samples.get(layer)
        lengths, fitted = self.count_own(layer, n_rows), self.get_fitted(layer)
        everyone, at = len(due) == len(lengths), torch.tensor(due, device=self.store.device)
        sample, valid = self.take_sample(layer, keys, n_rows)
        if not everyone:
            queries, sample, valid = (None if t is None else t.index_select(0, at) for t in (queries, sample, valid))
            assert sample is not None
        n_columns = self.count_columns(sample.shape[-1], self.account.record_bytes[layer])
        fit = self.fit_paper if self.config.paper else self.fit_bilinear
        projection = fit(layer, queries, sample, valid, n_columns)
        if everyone:
            index.clear()
            index.projection = projection
            for _, block in [(0, keys)] if keys is not None else read_keys(self.store, layer, 0, n_rows):
                self.encode(layer, block, n_rows)
        else:
            index.replace(projection, at, len(lengths))
            for start, block in read_keys(self.store, layer, 0, index.length):
                index.write(at, start, self.make_codes(block.index_select(0, at), projection))
        self.fitted_tokens[layer] = [lengths[i] if i in due else n for i, n in enumerate(fitted)]
        if self.profile is None and self.fits_skew:
            # Once per layer and fit: the receipt says where the skew came from.
            self.account.add_fallback("skew_from_prompt")

    def take_sample(
        self, layer: int, keys: Float[Tensor, "B Hkv S D"] | None, n_rows: int
    ) -> tuple[Float[Tensor, "b Hkv N D"], Bool[Tensor, "b N"] | None]:
        """Return an even sample of every sequence's keys, of `keys` or else the stored ones, and which are real."""
        visible = self.visible(layer, n_rows)
        real = None if visible is None else visible.all(1).expand(self.store.batch(layer), -1)
        return thin_keys(keys, real, FIT_KEYS) if keys is not None else sample_keys(self.store, layer, real, n_rows)

    def fit_bilinear(
        self, layer: int, queries: Tensor | None, keys: Tensor, valid: Bool[Tensor, "B S"] | None, n: int
    ) -> Projection:
        """Ours: the best rank-R score from the profile, or from this prompt's queries and keys."""
        if self.profile is not None:
            query, key, mean = (t.to(keys.device) for t in self.profile.bilinear(layer))
        else:
            assert queries is not None
            query, key, mean = solve_bilinear(measure_gram(queries, keys, valid))
        # Kernels read them as they lie.
        query, key = query[..., :n].contiguous(), key[..., :n].contiguous()
        return Projection(query, key, mean, fit_scale(project_keys(keys, key, mean), valid, self.bits))

    def fit_paper(
        self, layer: int, queries: Tensor | None, keys: Tensor, valid: Bool[Tensor, "B S"] | None, n: int
    ) -> Projection:
        """The paper's: an orthogonal skew, the strongest columns of this prompt, keys in the model's dtype."""
        assert queries is not None
        batch, heads, _, dim = keys.shape
        if self.profile is not None:
            skew = self.profile.svd(layer).to(keys.device)
        else:
            skew = solve_svd(measure_gram(queries, keys, valid))
        key = choose_columns(queries.reshape(batch, heads, -1, dim), keys, skew, n)
        zero = torch.zeros(batch, heads, 1, dim, device=keys.device)
        return Projection(key, key, zero, torch.ones(batch, heads, 1, n, device=keys.device))

    # --- how ------------------------------------------------------------------------------------------------

    def encode(self, layer: int, keys: Float[Tensor, "B Hkv T D"], room: int = 0) -> None:
        """Append the codes of new keys to the layer's index, of `room` tokens in all where more are to come."""
        projection = self.index[layer].projection
        assert projection is not None
        self.index[layer].append(self.make_codes(keys, projection), room)

    def make_codes(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return keys as the index holds them."""
        projected = project_keys(keys, projection.key, projection.mean)
        if self.config.paper:
            return projected.to(keys.dtype)
        codes = encode_keys(projected, projection.scale, self.bits)
        return pack_codes(codes) if self.bits == 4 else codes

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """Index columns R: ours fill 1/32 of the KV bytes, the paper's are 0.3 of the head dimension."""
        if self.config.columns is not None:
            wanted = self.config.columns
        elif self.config.paper:
            wanted = max(1, round(0.3 * k_dim))
        else:
            wanted = int(INDEX_SHARE * record_bytes * 8 / self.bits)
        # Two codes share a byte.
        even = wanted - wanted % 2 if self.bits == 4 else wanted
        # A profile holds every column of the paper's basis, but only the leading ones of ours.
        most = k_dim if self.config.paper else min(k_dim - k_dim % 2, MAX_COLUMNS)
        return max(2 if self.bits == 4 else 1, min(even, most))

    def index_token_bytes(self, shape: LayerShape) -> int:
        """Bytes one token adds to a layer's index."""
        bits = self.bits or 8 * shape.itemsize
        return shape.batch * shape.kv_heads * self.count_columns(shape.k_dim, shape.record_bytes) * bits // 8

    # --- the batch ------------------------------------------------------------------------------------------

    def forget(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
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

    def select(self, sequences: Int[Tensor, " N"], layer: int) -> None:
        """Keep these sequences, in the index, the samples and what is known of them too."""
        super().select(sequences, layer)
        self.index[layer].select(sequences)
        if layer in self.samples:
            self.samples[layer] = self.samples[layer].index_select(0, sequences.to(self.samples[layer].device))
        # The store has waited for these numbers already.
        order = sequences.tolist()
        for known in (self.strides, self.fitted_tokens):
            if layer in known:
                known[layer] = [known[layer][i] for i in order]

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        super().clear(layer)
        self.index[layer].clear()
        for known in (self.samples, self.strides, self.fitted_tokens, self.grown):
            known.pop(layer, None)
        self.unscored.discard(layer)
