"""One layer's index and what it was fitted to. It follows the layer's records.

In: a layer's queries and keys as they come. Out: an index whose projection is fitted to an even sample of the whole
prompt, however many passes the prompt came in. Every sequence of a batch has a projection of its own, as if it were
alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.math.sample import add_block, extend_sample, thin_columns, thin_keys, thin_queries, widen_stride
from farkv.methods.base import Place, Records
from farkv.methods.coder import Coder
from farkv.store.follow import Cropped
from farkv.store.near.index import LayerIndex, Projection

# Without a profile, a fit is final once it was made of this many tokens per head dimension.
FIT_TOKENS_PER_DIM = 8
SAMPLED_QUERIES = 256
# Keys of every sequence that a projection is fitted to, at most.
FIT_KEYS = 4096
# Of a text that was scored: passes of several tokens are fitted to once it is longer by half than what was fitted to.
GROWTH = 1.5


class Phase(NamedTuple):
    """The state of a layer's index apart from its codes; immutable, replaced by every pass.

    samples, strides: queries of every sequence, one of `strides` tokens each.  fitted: tokens that each sequence's
    projection was fitted to; None: nothing was.  grown: passes of several tokens have added records since the layer was
    last scored; its rows after the last of them, 0: they have not.  unscored: the first pass was fitted to as if it
    were the whole prompt, and may not have been.
    """

    samples: Tensor | None = None
    strides: list[int] | None = None
    fitted: list[int] | None = None
    grown: int = 0
    unscored: bool = False


class LayerFit:
    """The index of one layer."""

    def __init__(self, place: Place, coder: Coder, layer: int):
        self.place, self.coder, self.layer = place, coder, layer
        self.index = LayerIndex(place.ledger, place.device, place.reserve_tokens)
        self.phase = Phase()
        # The counts of `phase.fitted` that were found to be final.
        self._final: list[int] | None = None

    # --- when -----------------------------------------------------------------------------------------------

    def observe(self, records: Records, q: Float[Tensor, "B Hq T D"], k: Float[Tensor, "B Hkv T D"]) -> None:
        """1. Sample queries.  2. At the prompt's end fit the projection."""
        total, n_new = records.length, k.shape[2]
        # After an eviction the remaining records no longer represent the prompt.
        grows = n_new > 1 and not records.evicted
        if grows:
            if self.phase.unscored or total == n_new:
                # The earlier fit did not cover the whole prompt.
                self.index.clear()
                self.phase = self.phase._replace(unscored=False, fitted=None)
            self.phase = self.phase._replace(grown=total)
        if grows or not self.is_final(records):
            self.sample_queries(records, q)
        if grows and records.seen == (records.prompt_tokens or n_new):
            # If nothing was announced, the prompt may continue in later passes.
            self.phase = self.phase._replace(unscored=not records.prompt_tokens)
            # Coded records are indexed from their decoded values.
            self.fit_due(records, k if total == n_new and not records.is_coded else None)

    def catch_up(self, records: Records, n_rows: int) -> None:
        """Bring the index up to `n_rows` at least: what was read is fitted to, tokens have left the window."""
        if self.phase.unscored:
            self.phase = self.phase._replace(unscored=False)
        if self.phase.grown:
            self.fit_due(records, None)
        # In a padded batch a short sequence may need another fit, as it would alone.
        if not self.is_final(records):
            self.fit_due(records, None)
        if self.index.length < n_rows:
            total = records.length
            for _, keys in records.near_blocks(self.index.length, total):
                self.encode(keys, total)

    def count_final(self, records: Records) -> int:
        """Return the tokens a projection must have been fitted to, not to be fitted again."""
        return 1 if self.coder.is_settled or records.evicted else FIT_TOKENS_PER_DIM * records.shape.k_dim

    def is_final(self, records: Records) -> bool:
        """Say whether no sequence's projection will be fitted again."""
        fitted = self.phase.fitted
        if fitted is None or (fitted is not self._final and min(fitted) < self.count_final(records)):
            return False
        # Asked at every step: these counts need not be looked at again.
        self._final = fitted
        return True

    def find_due(self, records: Records, n_rows: int) -> list[int]:
        """Return the sequences to be fitted now, by their own tokens and those they were fitted to before."""
        final, fitted = self.count_final(records), self.get_fitted(records)
        grown = self.phase.grown > 0 and not records.evicted
        pairs = enumerate(zip(records.count_real(n_rows), fitted, strict=True))
        return [i for i, (n, old) in pairs if (old < final and n >= 2 * old) or (grown and n >= GROWTH * old)]

    def get_fitted(self, records: Records) -> list[int]:
        """Return how many tokens each sequence's projection was fitted to; 0: not fitted yet."""
        return self.phase.fitted or [0] * records.shape.batch

    # --- on what --------------------------------------------------------------------------------------------

    def sample_queries(self, records: Records, q: Float[Tensor, "B Hq T D"]) -> None:
        """Keep a thin sample of every sequence's queries so far; a few hundred per layer."""
        if not self.coder.needs_queries:
            return
        n_new, n_rows, old = q.shape[2], records.length, self.phase.samples
        before, after = records.count_real(n_rows - n_new), records.count_real(n_rows)
        was = self.phase.strides or [widen_stride(1, n, SAMPLED_QUERIES) for n in before]
        strides = [widen_stride(s, n, SAMPLED_QUERIES) for s, n in zip(was, after, strict=True)]
        n_slots = max(1, *(-(-n // s) for n, s in zip(after, strides, strict=True)))
        real = records.real_tokens(records.seen)
        if n_new == 1 and real is None and old is not None and strides == was:
            # Without padding all sequences have as many tokens; of those, one in `stride` is sampled.
            if n_slots > old.shape[2]:
                self.phase = self.phase._replace(samples=extend_sample(old, q, SAMPLED_QUERIES))
            return
        real = None if real is None else real[:, -n_new:].expand(q.shape[0], -1)
        tokens = torch.tensor([before, after, was, strides], device=q.device)
        self.phase = self.phase._replace(samples=thin_queries(old, q, real, tokens, n_slots), strides=strides)

    def fit_due(self, records: Records, keys: Float[Tensor, "B Hkv S D"] | None) -> None:
        """Fit the sequences that are due to the prompt's rows only; `keys` holds them if they are near already."""
        total = records.length
        n_rows = min(self.phase.grown or total, total)
        due = self.find_due(records, n_rows)
        if due:
            self.fit(records, keys, due, n_rows)
        if not self.phase.unscored:
            self.phase = self.phase._replace(grown=0)
            if self.is_final(records):
                self.phase = self.phase._replace(samples=None, strides=None)

    def fit(self, records: Records, keys: Float[Tensor, "B Hkv S D"] | None, due: list[int], n_rows: int) -> None:
        """Decide by `n_rows` rows how keys of the sequences `due` enter the index, and code theirs anew."""
        queries, lengths, fitted = self.phase.samples, records.count_real(n_rows), self.get_fitted(records)
        everyone, at = len(due) == len(lengths), torch.tensor(due, device=self.place.device)
        sample, valid = self.take_sample(records, keys, n_rows)
        if not everyone:
            sample = sample.index_select(0, at)
            queries, valid = (None if t is None else t.index_select(0, at) for t in (queries, valid))
        n_columns = self.coder.count_columns(sample.shape[-1], records.shape.record_bytes)
        projection = self.coder.fit(self.layer, queries, sample, valid, n_columns)
        if everyone:
            self.index.clear()
            self.index.projection = projection
            for _, block in [(0, keys)] if keys is not None else records.near_blocks(0, n_rows):
                self.encode(block, n_rows)
        else:
            self.index.replace(projection, at, len(lengths))
            for start, block in records.near_blocks(0, self.index.length):
                self.index.write(at, start, self.coder.encode(block.index_select(0, at), projection))
        chosen = set(due)
        self.phase = self.phase._replace(fitted=[lengths[i] if i in chosen else n for i, n in enumerate(fitted)])
        if self.coder.fits_skew:
            # Once per layer and fit: the receipt says where the skew came from.
            self.place.on_fallback("skew_from_prompt")

    def take_sample(
        self, records: Records, keys: Float[Tensor, "B Hkv S D"] | None, n_rows: int
    ) -> tuple[Float[Tensor, "b Hkv N D"], Bool[Tensor, "b N"] | None]:
        """Return an even sample of every sequence's keys, of `keys` or else the stored ones, and which are real.

        Cost: where they are stored, every key read once; no more than a block and the sample are near at once.
        """
        visible = records.visible(n_rows)
        real = None if visible is None else visible.all(1).expand(records.shape.batch, -1)
        if keys is not None:
            return thin_keys(keys, real, FIT_KEYS)
        columns, valid = thin_columns(n_rows, real, FIT_KEYS, self.place.device)
        sample = torch.empty(0, device=self.place.device)
        for start, block in records.near_blocks(0, n_rows):
            if start == 0:
                sample = block.new_zeros(*block.shape[:2], columns.shape[1], block.shape[3])
            add_block(sample, columns, start, block)
        return (sample if valid is None else sample.masked_fill(~valid[:, None, :, None], 0)), valid

    # --- how ------------------------------------------------------------------------------------------------

    def encode(self, keys: Float[Tensor, "B Hkv T D"], room: int = 0) -> None:
        """Append the codes of new keys to the index, of `room` tokens in all where more are to come."""
        assert self.index.projection is not None
        self.index.append(self.coder.encode(keys, self.index.projection), room)

    def get_projection(self) -> Projection:
        """Return how queries and keys meet in the index."""
        assert self.index.projection is not None
        return self.index.projection

    # --- the records change -----------------------------------------------------------------------------------

    def crop(self, now: Cropped) -> None:
        """Forget the newest tokens' codes."""
        self.index.crop(now)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the codes at these positions."""
        self.index.keep(positions)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences, in the index, the samples and what is known of them too."""
        self.index.select(sequences)
        samples, strides, fitted = self.phase[:3]
        # The store has waited for these numbers already.
        order = sequences.tolist()
        self.phase = self.phase._replace(
            samples=None if samples is None else samples.index_select(0, sequences.to(samples.device)),
            strides=None if strides is None else [strides[i] for i in order],
            fitted=None if fitted is None else [fitted[i] for i in order],
        )

    def clear(self) -> None:
        """Forget everything."""
        self.index.clear()
        self.phase = Phase()

    def restore(self, phase: Phase, projection: Projection | None) -> None:
        """Put back what a pass had found; the codes' rows are those of then again."""
        self.phase = phase
        if self.index.projection is not projection:
            # Codes of another projection mean nothing: the keys are indexed again when they are scored next.
            self.index.clear()
            self.index.projection = projection
