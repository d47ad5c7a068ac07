"""One layer's index and what it was fitted to. It follows the layer's records.

In: a layer's queries and keys as they come. Out: an index whose projection is fitted to an even sample of the whole
prompt, however many passes the prompt came in; and fitted again, to all keys and the newest queries, when the text that
was appended since is explained clearly worse (`math.drift`). Every sequence of a batch has a projection of its own, as
if it were alone.
"""

from __future__ import annotations

import math

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.math.drift import KEYS, is_worse
from farkv.math.sample import add_block, extend_sample, thin_columns, thin_keys, thin_queries, widen_stride
from farkv.math.step import Query
from farkv.methods.base import Place, Records
from farkv.methods.coder import Coder, take_queries
from farkv.methods.gains import Trial, try_heads
from farkv.methods.phase import Phase
from farkv.methods.records import find_real
from farkv.methods.watch import NEVER, Watch, crop_watch, find_woken, keep_newest, look_at, note_shares, rest
from farkv.store.follow import Cropped
from farkv.store.near.index import LayerIndex, Projection

# Without a profile, a fit is final once it was made of this many tokens per head dimension.
FIT_TOKENS_PER_DIM = 8
SAMPLED_QUERIES = 256
# Keys of every sequence that a projection is fitted to, at most.
FIT_KEYS = 4096
# Where nobody looks for drift: passes of several tokens are fitted to once they make the text longer by half.
GROWTH = 1.5


class LayerFit:
    """The index of one layer.

    Args:
        trial: by which heads are found that draw their records; None: none do.
    """

    def __init__(self, place: Place, coder: Coder, layer: int, trial: Trial | None = None):
        self.place, self.coder, self.layer, self.trial = place, coder, layer, trial
        self.index = LayerIndex(place.ledger, place.device, place.reserve_tokens)
        self.phase = Phase()
        # The counts of `phase.fitted` that were found to be final.
        self._final: list[int] | None = None

    # --- when -----------------------------------------------------------------------------------------------

    def observe(self, records: Records, query: Query, k: Float[Tensor, "B Hkv T D"]) -> None:
        """1. Sample queries.  2. Where drift is soon looked for, keep the newest.  3. At the prompt's end, fit.

        Cost: at most steps of a layer whose fit is final, two comparisons.
        """
        total, n_new = records.length, k.shape[2]
        # After an eviction the remaining records no longer represent the prompt.
        grows = n_new > 1 and not records.evicted
        if grows:
            if self.phase.unscored or total == n_new:
                # The earlier fit did not cover the whole prompt.
                self.index.clear()
                self.phase = self.phase._replace(unscored=False, fitted=None, watch=self.phase.watch.wake_up())
            self.phase = self.phase._replace(grown=total)
        if not self.is_final(records) or (grows and not self.coder.drifts):
            self.sample_queries(records, query)
        if total > self.phase.watch.asleep:
            self.stay_awake(records, query)
        if grows and records.seen == (records.prompt_tokens or n_new):
            # If nothing was announced, the prompt may continue in later passes.
            self.phase = self.phase._replace(unscored=not records.prompt_tokens)
            # Coded records are indexed from their decoded values.
            self.fit_due(records, k if total == n_new and not records.is_coded else None)

    def stay_awake(self, records: Records, query: Query) -> None:
        """Keep the newest queries; where it is time, let drift be looked for when the layer is scored next."""
        watch, total = self.phase.watch, records.length
        if records.evicted or not self.coder.drifts:
            self.phase = self.phase._replace(watch=Watch(asleep=NEVER))
        elif query.q.shape[2] > 1 or not self.phase.grown:
            watch = keep_newest(watch, take_queries(self.coder, query))
            wakes = watch.is_ready and total >= watch.wake and self.phase.fitted is not None
            self.phase = self.phase._replace(watch=watch, grown=total if wakes else self.phase.grown)

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
        """Return the tokens a projection must have been fitted to, to be fitted again for drift alone."""
        return 1 if self.coder.is_settled or records.evicted else FIT_TOKENS_PER_DIM * records.shape.k_dim

    def is_final(self, records: Records) -> bool:
        """Say whether no sequence's projection will be fitted again but for drift."""
        fitted = self.phase.fitted
        if fitted is None or (fitted is not self._final and min(fitted) < self.count_final(records)):
            return False
        # Asked at every step: these counts need not be looked at again.
        self._final = fitted
        return True

    def find_due(self, records: Records, n_rows: int) -> list[int]:
        """Return the sequences to be fitted now, by their own tokens and those they were fitted to before."""
        final, fitted = self.count_final(records), self.get_fitted(records)
        grown = self.phase.grown > 0 and not (records.evicted or self.coder.drifts)
        pairs = enumerate(zip(records.count_real(n_rows), fitted, strict=True))
        return [i for i, (n, old) in pairs if (old < final and n >= 2 * old) or (grown and n >= GROWTH * old)]

    def find_drifted(self, records: Records, n_rows: int) -> list[int]:
        """Return the sequences whose index explains their newest tokens clearly worse than when it was fitted.

        Cost: where one is due to be looked at, 256 keys read and coded, and 64 queries' scores of them.
        """
        own, watch = records.count_real(n_rows), self.phase.watch
        woken = find_woken(watch, own) if self.phase.grown >= watch.wake else []
        if not woken:
            return []
        found = self.measure(records, n_rows)
        self.phase = self.phase._replace(watch=note_shares(watch, {i: found[i] for i in woken}, own, fitted=False))
        return [i for i in woken if watch.shares is not None and is_worse(found[i], watch.shares[i])]

    def get_fitted(self, records: Records) -> list[int]:
        """Return how many tokens each sequence's projection was fitted to; 0: not fitted yet."""
        return self.phase.fitted or [0] * records.shape.batch

    # --- on what --------------------------------------------------------------------------------------------

    def sample_queries(self, records: Records, query: Query) -> None:
        """Keep a thin sample of every sequence's queries so far; a few hundred per layer."""
        if not self.coder.needs_queries:
            return
        n_new, n_rows, old = query.q.shape[2], records.length, self.phase.samples
        before, after = records.count_real(n_rows - n_new), records.count_real(n_rows)
        was = self.phase.strides or [widen_stride(1, n, SAMPLED_QUERIES) for n in before]
        strides = [widen_stride(s, n, SAMPLED_QUERIES) for s, n in zip(was, after, strict=True)]
        n_slots = max(1, *(-(-n // s) for n, s in zip(after, strides, strict=True)))
        real = records.real_tokens(records.seen)
        if n_new == 1 and real is None and old is not None and strides == was:
            # Without padding all sequences have as many tokens; of those, one in `stride` is sampled.
            if n_slots > old.shape[2]:
                newest = take_queries(self.coder, query)
                self.phase = self.phase._replace(samples=extend_sample(old, newest, SAMPLED_QUERIES))
            return
        q = take_queries(self.coder, query)
        real = None if real is None else real[:, -n_new:].expand(q.shape[0], -1)
        tokens = torch.tensor([before, after, was, strides], device=q.device)
        self.phase = self.phase._replace(samples=thin_queries(old, q, real, tokens, n_slots), strides=strides)

    def fit_due(self, records: Records, keys: Float[Tensor, "B Hkv S D"] | None) -> None:
        """Fit the sequences that are due to the prompt's rows only; `keys` holds them if they are near already."""
        total = records.length
        n_rows = min(self.phase.grown or total, total)
        due = self.find_due(records, n_rows)
        if due:
            self.fit(records, keys, due, n_rows, self.phase.samples)
        drifted = self.find_drifted(records, n_rows) if self.phase.grown else []
        if drifted:
            # What is asked next is like what was asked of late.
            self.fit(records, None, drifted, n_rows, self.phase.watch.get_newest())
            self.place.on_fallback("refit")
        if not self.phase.unscored:
            own, final = records.count_real(n_rows), self.count_final(records)
            watch = rest(self.phase.watch, own, n_rows, [n < final for n in self.get_fitted(records)])
            self.phase = self.phase._replace(grown=0, watch=watch)
            if self.is_final(records):
                self.phase = self.phase._replace(samples=None, strides=None)

    def fit(
        self,
        records: Records,
        keys: Float[Tensor, "B Hkv S D"] | None,
        due: list[int],
        n_rows: int,
        queries: Float[Tensor, "B Hq M D"] | None,
    ) -> None:
        """Decide by `n_rows` rows how keys of the sequences `due` enter the index, and code theirs anew.

        Cost: every stored key read twice and coded once; for a skew, a singular value decomposition per KV head.
        """
        lengths, fitted = records.count_real(n_rows), self.get_fitted(records)
        everyone, at = len(due) == len(lengths), torch.tensor(due, device=self.place.device)
        sample, valid = self.take_sample(records, keys, n_rows)
        if not everyone:
            sample = sample.index_select(0, at)
            queries, valid = (None if t is None else t.index_select(0, at) for t in (queries, valid))
        size = self.coder.measure(sample.shape[-1], records.shape.record_bytes)
        projection = self.coder.fit(self.layer, queries, sample, valid, size)
        if everyone:
            self.index.clear()
            self.index.projection = projection
            for _, block in [(0, keys)] if keys is not None else records.near_blocks(0, n_rows):
                self.encode(block, n_rows)
        else:
            self.index.replace(projection, at, len(lengths))
            for start, block in records.near_blocks(0, self.index.length):
                self.index.write(at, start, self.coder.encode(block.index_select(0, at), projection))
            for _, block in records.near_blocks(self.index.length, n_rows):
                self.encode(block, n_rows)
        if self.trial is not None and queries is not None and records.lies_open:
            self.index.mark(at, try_heads(records, queries, self.index, self.trial, due, n_rows))
        self.phase = self.phase._replace(fitted=[lengths[i] if i in due else n for i, n in enumerate(fitted)])
        if self.coder.drifts:
            found = self.measure(records, n_rows)
            watch = note_shares(self.phase.watch, {i: found[i] for i in due}, lengths, fitted=True)
            self.phase = self.phase._replace(watch=watch)
        if self.coder.fits_skew:
            # Once per layer and fit: the receipt says where the skew came from.
            self.place.on_fallback("skew_from_prompt")

    def measure(self, records: Records, n_rows: int) -> list[float]:
        """Return what every sequence's index leaves unexplained of the newest queries' scores of the newest keys.

        Not known, NaN, where no query was kept.
        """
        queries, projection = self.phase.watch.get_newest(), self.get_projection()
        if queries is None:
            return [math.nan] * records.shape.batch
        first, real = max(0, n_rows - KEYS), find_real(records, n_rows)
        keys = torch.cat([block for _, block in records.near_blocks(first, n_rows)], 2)
        told = self.coder.decode(self.coder.encode(keys, projection), projection)
        # A deliberate sync, once per look.
        return look_at(queries, keys, told, projection, real).tolist()

    def take_sample(
        self, records: Records, keys: Float[Tensor, "B Hkv S D"] | None, n_rows: int
    ) -> tuple[Float[Tensor, "b Hkv N D"], Bool[Tensor, "b N"] | None]:
        """Return an even sample of every sequence's keys, of `keys` or else the stored ones, and which are real.

        Cost: where they are stored, every key read once; no more than a block and the sample are near at once.
        """
        real = find_real(records, n_rows)
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
        self.phase = self.phase._replace(watch=crop_watch(self.phase.watch, now.length))

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the codes at these positions."""
        self.index.keep(positions)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences, in the index, the samples and what is known of them too."""
        self.index.select(sequences)
        # The store has waited for these numbers already.
        self.phase = self.phase.select(sequences.tolist(), sequences)

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
