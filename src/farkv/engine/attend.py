"""Attention over what a step reads: all records or chosen ones, by the model's own attention or by a fast kernel.

In: a step, and which records. Out: attention output. Reads are counted here and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Float32, Int, Tensor
from farkv.account import BIT, INEXACT, ROUNDING, VERIFIED, Account
from farkv.engine.budget import Budgets
from farkv.engine.fast_path import FastPath, Reads
from farkv.engine.mass import measure_found
from farkv.engine.mode import Mode
from farkv.engine.pool_policy import PoolPolicy
from farkv.engine.records import LayerRecords
from farkv.errors import CacheStateError
from farkv.math.attention import add_odds, align_mask, align_rows
from farkv.math.select import Choice
from farkv.math.step import AttentionFunction, Step, describe_bias
from farkv.math.stream import Stream
from farkv.store.records import Fetch, Read
from farkv.store.tiers import BLOCK_TOKENS, Store

# Flags of a mask over the rows of an evicted layer, which differ from head to head, at a time: as numbers 8 MiB.
MASK_FLAGS = 2 << 20


class Fetched(NamedTuple):
    """What a step reads: records chosen before its true query was known, or by it; the rest; and the newest."""

    early: Fetch
    late: Fetch | None
    n_newest: int

    @property
    def n_rows(self) -> int:
        """Return the rows of every KV head."""
        parts = (self.early,) if self.late is None else (self.early, self.late)
        return sum(part.positions.shape[-1] for part in parts) + self.n_newest

    @property
    def is_whole(self) -> bool:
        """Say whether every place holds a record."""
        return self.early.valid is None and (self.late is None or self.late.valid is None)


class Attention:
    """Attention of one cache.

    Args:
        policy: of a pool that evicts when it is full: it must see each record that is read.
    """

    def __init__(self, budgets: Budgets, fast: FastPath, account: Account, mode: Mode, policy: PoolPolicy | None):
        self.budgets, self.fast, self.account, self.mode, self.policy = budgets, fast, account, mode, policy
        self.store: Store = budgets.store

    # --- by a kernel ----------------------------------------------------------------------------------------

    def may_run_fast(self, layer: int, step: Step) -> bool:
        """Return whether a kernel may attend: a choice is read, it supports the step, nothing observes the reads."""
        if self.budgets.share_of(layer) >= 1 and not self.fast.everywhere:
            # Everything was asked for: that is the model's own attention, bit for bit.
            return False
        return self.policy is None and not self.mode.measures and self.fast.may_attend(step)

    def may_read_in_place(self, layer: int, step: Step) -> bool:
        """Say whether a kernel may read the records where they lie."""
        return not self.store.travels and self.may_run_fast(layer, step)

    def read_in_place(
        self,
        records: LayerRecords,
        step: Step,
        attention: AttentionFunction,
        chosen: Choice | None,
        n_newest: int,
    ) -> object:
        """Attend to the chosen rows (all without a choice) and the `n_newest` newest, in the pool's memory."""
        layer, n, heads = records.layer, records.length, step.k.shape[0] * step.k.shape[1]
        positions, counts = (None, None) if chosen is None else (chosen.positions, chosen.counts)
        n_read = n if positions is None else positions.shape[-1] + n_newest
        self._count(records, step, heads * n_read if counts is None else int(counts.sum()) + heads * n_newest)
        self._note(records, n_read if counts is None else 0, ROUNDING)
        if chosen is not None and self.account.trace is not None:
            flagged = chosen.flag()
            self._trace(records, flagged.positions, flagged.valid, n_newest)
        elif chosen is None:
            self._trace(records, None, None, n_newest)
        odds = None if chosen is None else chosen.odds
        reads = Reads(self.store.get_rows(layer), n, positions, n_newest, counts, odds)
        return self.fast.attend(layer, step, attention, reads)

    # --- chosen records -------------------------------------------------------------------------------------

    def read_chosen(
        self,
        records: LayerRecords,
        step: Step,
        attention: AttentionFunction,
        fetched: Fetched,
        odds: Float32[Tensor, "B Hkv K"] | None = None,
    ) -> object:
        """Attend to what was fetched, and to the newest records.

        Args:
            odds: added to the logits of what was chosen early.
        """
        layer, store = records.layer, self.store
        is_fast = store.is_far and fetched.is_whole and odds is None and self.may_run_fast(layer, step)
        # What is not valid was left out; what was chosen late stands behind what is newer.
        how = ROUNDING if is_fast or fetched.late is not None else BIT
        n_rows = fetched.n_rows if fetched.is_whole else 0
        if step.own is not None and step.own.chosen is None and n_rows < records.seen:
            # What was left out the plain model hides: its sums have the same terms, and zeros besides.
            n_rows, how = records.seen, ROUNDING
        self._note(records, n_rows, how)
        if is_fast:
            stored = store.join(layer, *fetched)
            self._count(records, step, stored.positions.numel())
            self._trace(records, stored.positions, stored.valid)
            return self.fast.attend(layer, step, attention, Reads(stored.rows, stored.rows.shape[2]))
        # In place, what was chosen is gathered now; else it is in a buffer.
        gathered = 0 if store.is_far else fetched.n_rows * store.shape(layer).token_bytes
        with store.hold(gathered, gathered=True), store.hold(records.count_expanded(fetched.n_rows)):
            read = store.read(layer, *fetched)
            if self.policy is not None:
                self.policy.note(layer, step.query, read)
            self._count(records, step, read.positions.numel() if read.valid is None else read.valid.sum())
            self._trace(records, read.positions, read.valid)
            self._measure(records, step, read)
            mask = step.mask
            if mask is not None or read.valid is not None:
                mask = align_mask(mask, store.locate(layer, read.positions), read.valid, step.n_groups)
            if odds is not None:
                mask = add_odds(mask, odds, read.positions.shape[-1], step.n_groups)
            return attention(step.query.q, read.k, read.v, mask)

    # --- all records ----------------------------------------------------------------------------------------

    def read_all(self, records: LayerRecords, step: Step, attention: AttentionFunction) -> object:
        """Attend to every record of a layer."""
        layer, n_new, total = records.layer, step.n_new, records.seen
        if n_new > 1 and not self.mode.dense:
            self._count_dense(records, step)
        if n_new == 1 and total > 1 and not self.mode.dense:
            if self.fast.everywhere and self.may_read_in_place(layer, step):
                return self.read_in_place(records, step, attention, None, 0)
            self._count(records, step, step.k.shape[0] * step.k.shape[1] * records.length)
            self._trace(records, None, None)
            self._measure(records, step, None)
        in_blocks = total > n_new and self.store.streams
        if step.has_bias and (in_blocks or self.store.evicted[layer]):
            raise CacheStateError(describe_bias(step))
        self._note(records, total, ROUNDING if in_blocks else BIT)
        if total == n_new:
            with self.store.hold(step.new_bytes):
                return attention(step.query.q, step.k, step.v, step.mask)
        if in_blocks:
            return self._read_blocks(records, step, attention)
        expanded = records.count_expanded(total if self.mode.dense else records.length)
        with self.store.hold(expanded), self.store.read_all(layer, whole=self.mode.dense) as (k, v):
            mask = step.mask
            if mask is not None and k.shape[2] < total:
                if step.query.q.shape[:2].numel() * n_new * k.shape[2] > MASK_FLAGS:
                    return self._read_pieces(records, step, attention, (k, v))
                mask = self._align(records, step, mask, 0, k.shape[2])
            return attention(step.query.q, k, v, mask)

    def _read_pieces(
        self, records: LayerRecords, step: Step, attention: AttentionFunction, rows: tuple[Tensor, Tensor]
    ) -> object:
        """Attend to all rows of an evicted layer, of which each head has its own, without a mask of all of them."""
        stream = Stream(step.query.q, step.query.logits._replace(sinks=attention.sinks))
        for start in range(0, rows[0].shape[2], BLOCK_TOKENS):
            k, v = (part[:, :, start : start + BLOCK_TOKENS] for part in rows)
            self._add(records, step, stream, (start, k, v))
        return attention.wrap(stream.finish())

    def _add(self, records: LayerRecords, step: Step, stream: Stream, block: tuple[int, Tensor, Tensor]) -> None:
        """Add a block of stored rows to a stream; of an evicted layer, for few queries at a time."""
        start, k, stored_v = block
        v, stop = step.values_of(k, stored_v), start + k.shape[2]
        if step.mask is None or not self.store.evicted[records.layer]:
            stream.add(k, v, self._see(records, step, start, stop))
            return
        n = max(1, MASK_FLAGS // (step.query.q.shape[:2].numel() * k.shape[2]))
        for first in range(0, step.n_new, n):
            rows = slice(first, min(first + n, step.n_new))
            part = step._replace(mask=step.mask[:, :, rows])
            stream.take_part(rows, k.shape[1], v.shape[-1]).add(k, v, self._see(records, part, start, stop))

    def _read_blocks(self, records: LayerRecords, step: Step, attention: AttentionFunction) -> object:
        """Attend to the records block by block, and to the new tokens, which are near already."""
        n_new = step.n_new
        stream = Stream(step.query.q, step.query.logits._replace(sinks=attention.sinks))
        for start, k, v in self.store.read_blocks(records.layer, records.length - n_new):
            self._add(records, step, stream, (start, k, v))
        with self.store.hold(step.new_bytes):
            own = None if step.mask is None else step.mask[..., -n_new:]
            # A deliberate sync, once per pass and layer: the fused kernel is faster without a mask.
            causal = own is None or bool((own == torch.ones_like(own[:1]).tril()).all())
            stream.add(step.k, step.v, None if causal else own, causal=causal)
        return attention.wrap(stream.finish())

    def _see(self, records: LayerRecords, step: Step, start: int, stop: int) -> Tensor | None:
        """Return what the new queries see of the rows from `start` to `stop`, None where all see all."""
        if step.mask is None:
            return None
        evicted = self.store.evicted[records.layer]
        visible = self._align(records, step, step.mask, start, stop) if evicted else step.mask[..., start:stop]
        # A deliberate sync, once per block, for the same reason.
        return None if bool(visible.all()) else visible

    def _align(self, records: LayerRecords, step: Step, mask: Tensor, start: int, stop: int) -> Tensor:
        """Turn the mask over the context into one over the stored rows from `start` to `stop`."""
        rows = torch.arange(start, stop, device=mask.device).expand(*step.k.shape[:2], -1)
        return align_rows(mask, self.store.locate(records.layer, rows), step.n_groups)

    # --- what is counted --------------------------------------------------------------------------------------

    def _count(self, records: LayerRecords, step: Step, n_records: int | Tensor) -> None:
        """Count one decode step's records of a layer."""
        held = step.k.shape[0] * step.k.shape[1] * records.seen
        self.account.layer(records.layer).add_read(n_records, held)

    def _count_dense(self, records: LayerRecords, step: Step) -> None:
        """Count the decode steps among a pass's tokens, its newest: each read all that was before it."""
        n, n_heads = min(self.account.pass_steps, step.n_new), step.k.shape[0] * step.k.shape[1]
        later = n * (n - 1) // 2
        held = n * records.seen - later
        self.account.layer(records.layer).add_read(n_heads * (held - n * records.evicted), n_heads * held)

    def _note(self, records: LayerRecords, n_rows: int, how: str) -> None:
        """Note how near this read of `n_rows` rows is to the plain model's: no nearer than `how`."""
        if self.mode.dense or self.mode.is_draft or self.account.exact == INEXACT:
            # A verifying pass is forgotten, and a draft; and there is nothing worse.
            return
        is_whole = n_rows == records.seen and not records.evicted
        # The first pass attends to what the model made, before it is coded; what follows does not.
        coded = VERIFIED if self.mode.reads_all else INEXACT
        self.account.note_exact(how if is_whole and not records.is_coded else coded if is_whole else INEXACT)

    def _trace(
        self,
        records: LayerRecords,
        rows: Int[Tensor, "B Hkv K"] | None,
        valid: Bool[Tensor, "B Hkv K"] | None,
        n_newest: int = 0,
    ) -> None:
        """Report to the trace which rows (None: all) and how many of the newest a decode step reads."""
        trace, store, layer = self.account.trace, self.store, records.layer
        if trace is None:
            return
        n, heads = records.length, store.heads(layer)
        if rows is None or n_newest:
            device = store.device if rows is None else rows.device
            newest = torch.arange(0 if rows is None else n - n_newest, n, device=device).expand(*heads, -1)
            valid = None if valid is None else torch.cat([valid, torch.ones_like(newest, dtype=torch.bool)], -1)
            rows = newest if rows is None else torch.cat([rows, newest], -1)
        trace.note(layer, store.locate(layer, rows), valid, records.seen)

    def _measure(self, records: LayerRecords, step: Step, read: Read | None) -> None:
        """Measure the true attention mass of a choice, on verified steps only."""
        if self.mode.measures:
            self.account.layer(records.layer).add_mass(*measure_found(records, step, read))
