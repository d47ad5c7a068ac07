"""One method at work on one cache. Read this page first: a step goes through it from top to bottom.

  append      admit new keys and values under the byte limits, store them           (`engine.admit`, `store`)
  speculate   one layer ahead: choose by an estimated query, start the fetch        (`engine.choose`, `store.link`)
  attend      choose, or top up what was speculated; attend; observe               (`engine.attend`)
  commit      the pass is over in all layers: evict what is due                    (`engine.evict`)

A pass over more than one token attends to everything, exactly, but for guessed tokens of an answer (`engine.drafted`).
Whoever runs the model calls the first three per layer, in the model's order, and then commits the pass, or takes it
back (`engine.undo`). `engine.build` makes an engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from farkv._axes import Int, Tensor
from farkv.engine.attend import Fetched
from farkv.engine.budget import Budget
from farkv.engine.parts import Parts
from farkv.engine.setup import Setup
from farkv.errors import CacheStateError
from farkv.math.select import Choice
from farkv.math.step import AttentionFunction, Query, Step, describe_bias
from farkv.store.records import Fetch
from farkv.store.sizes import LayerShape
from farkv.store.whole import crop, cut_layer, find_fault

NEVER = sys.maxsize


class Engine:
    """The steps of one cache, in order."""

    def __init__(self, setup: Setup, parts: Parts):
        self.setup, self.account, self.layers = setup, setup.account, setup.layers
        self.parts, self.store, self.mode = parts, parts.store, parts.mode
        self.selector, self.records, self.padding = parts.selector, parts.records, parts.padding
        # Per speculated layer: the fetch in flight and the budget it was chosen under.
        self.pending: dict[int, tuple[Fetch, Budget]] = {}
        # The first so many tokens were computed from everything before them: what was chosen has a part in the next.
        self.dense_tokens = NEVER

    def begin_pass(self, n_new: int, n_before: int) -> None:
        """Note what a pass over `n_new` tokens is for, which finds `n_before`."""
        account, mode = self.account, self.mode
        steps = account.begin_pass(n_new, n_before, mode.prompt_tokens)
        # What nobody said to be guesses may be another turn's prompt: it is read whole.
        guesses = n_new > 1 and account.prompt_tokens is not None and not mode.reads_all
        mode.drafted = steps if guesses else 0

    # --- 1. append ------------------------------------------------------------------------------------------

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens; the first managed layer admits them for all layers.

        Raises:
            CapacityError: a limit cannot hold them; nothing was stored.
        """
        parts = self.parts
        if layer not in self.account.record_bytes:
            self.account.record_bytes[layer] = LayerShape.of(k, v).record_bytes
        if layer == self.layers[0]:
            shape = LayerShape.of(k, v)
            parts.eviction.begin(k.shape[2], self.mode.prompt_tokens)
            if k.shape[2] > 1 or self.mode.reads_all:
                # A dense read takes the near memory that decode steps had: admission counts the wider of both. No fetch
                # is under way between passes.
                self.store.buffers.clear()
            self.store.open_pages(shape, k.dtype)
            parts.admission.admit(shape, k.shape[2])
            if self.mode.drafted and self._reads_guesses_whole(layer):
                self.account.add_fallback("whole_guesses")
        if self.is_drafted(layer):
            # Stored one by one, as they are attended to (`engine.drafted`).
            return
        if parts.eviction.passing:
            self.store.pass_by(layer, k, v)
            return
        parts.eviction.make_room(layer, k.shape[2])
        self.store.append(layer, k, v)

    def is_drafted(self, layer: int) -> bool:
        """Say whether tokens of this pass read by a choice of their own: not where a layer reads all, or evicts."""
        if not self.mode.drafted or self.mode.dense or self._reads_guesses_whole(layer):
            return False
        return not self.selector.reads_all(layer) and self.parts.budgets.share_of(layer) < 1

    def _reads_guesses_whole(self, layer: int) -> bool:
        """Say whether guesses are read in one pass: what evicts counts them, an indexer and latents are of a pass."""
        one_pass = self.setup.setting.indexer is not None or self.records[layer].latents.rank > 0
        return one_pass or self.parts.eviction.is_active

    def has_weights(self, n_new: int) -> bool:
        """Say whether a pass over `n_new` tokens attends to all records of all layers, by the model's own attention."""
        parts = self.parts
        if parts.eviction.is_active or (self.store.streams and self.list_tokens()[:1] != [0]):
            return False
        if n_new > 1 and self.account.prompt_tokens is None:
            return True
        is_whole = all(parts.budgets.share_of(layer) >= 1 or self.selector.reads_all(layer) for layer in self.layers)
        return is_whole and not parts.attention.fast.everywhere if n_new == 1 else is_whole

    def make_room(self, n_new: int) -> None:
        """Make room in a full pool, in all layers, before a pass begins: where that fails, the room stays made."""
        for layer in self.layers:
            self.parts.eviction.make_room(layer, n_new)

    # --- 2. speculate ---------------------------------------------------------------------------------------

    def wants_estimate(self, layer: int) -> bool:
        """Return whether this layer should be speculated now."""
        mode, reads_all = self.mode, self.selector.reads_all(layer)
        skips = self.selector.source is None or mode.dense or mode.reads_all or reads_all
        return not skips and self.store.length(layer) > 0

    def speculate(self, layer: int, estimate: Query) -> None:
        """Choose records for a layer that has not run yet and start their fetch, which overlaps the previous layer."""
        records = self.records[layer]
        budget = self.parts.budgets.get(records.seen + 1, layer)
        early = self.parts.chooser.choose(records, estimate, records.length + 1, budget).flag()
        self.pending[layer] = (
            self.store.fetch(layer, early.positions, early.valid, spare=budget.late + budget.newest),
            budget,
        )

    # --- 3. attend ------------------------------------------------------------------------------------------

    def attend(self, layer: int, step: Step, attention: AttentionFunction) -> object:
        """Attend to all records, or at a decode step to the chosen ones; then update the method, note what is due."""
        parts = self.parts
        if layer == self.layers[0]:
            # One mask for all managed layers of a pass.
            self.padding.note(None if step.has_bias else step.seen)
        if self.mode.dense:
            return parts.attention.read_all(self.records[layer], step, attention)
        if step.has_bias and (parts.eviction.is_active or self._is_chosen(layer, step)):
            raise CacheStateError(describe_bias(step))
        parts.eviction.observe(layer, step)
        if parts.eviction.passing:
            return parts.eviction.store_passing(layer, step, attention)
        if self._is_chosen(layer, step):
            self.dense_tokens = min(self.dense_tokens, self.store.seen(layer) - 1)
            out = self._attend_chosen(layer, step, attention)
        else:
            self.pending.pop(layer, None)
            out = parts.attention.read_all(self.records[layer], step, attention)
        self.selector.observe(self.records[layer], step)
        parts.eviction.settle(layer, step)
        return out

    def _is_chosen(self, layer: int, step: Step) -> bool:
        """Say whether a step reads what is chosen; a pass over several tokens, and the first, read all."""
        if step.has_bias and self.parts.budgets.share_of(layer) >= 1:
            # Only the model's own attention can follow such a mask: it reads everything as it lies.
            return False
        is_one = step.n_new == 1 and self.store.seen(layer) > 1 and not self.mode.reads_all
        return is_one and not self.selector.reads_all(layer)

    def _attend_chosen(self, layer: int, step: Step, attention: AttentionFunction) -> object:
        """Top up what was speculated, or choose by the true query; then attend."""
        records, parts = self.records[layer], self.parts
        if step.own is not None:
            self.selector.take_choice(records, step)
        if layer in self.pending:
            early, budget = self.pending.pop(layer)
            rest = parts.chooser.choose_rest(records, step.query, budget, Choice(early.positions, early.valid))
            late = None if rest is None else Fetch(rest.positions, rest.valid, None, None)
            return parts.attention.read_chosen(records, step, attention, Fetched(early, late, budget.newest))
        budget = parts.budgets.get(records.seen, layer).join_late()
        in_place = parts.attention.may_read_in_place(layer, step)
        if in_place and budget.early + budget.newest >= records.length:
            return parts.attention.read_in_place(records, step, attention, None, 0)
        chosen = parts.chooser.choose(records, step.query, records.length, budget)
        if in_place and chosen.valid is None:
            return parts.attention.read_in_place(records, step, attention, chosen, budget.newest)
        chosen = chosen.flag()
        early = self.store.fetch(layer, chosen.positions, chosen.valid, spare=budget.newest)
        return parts.attention.read_chosen(records, step, attention, Fetched(early, None, budget.newest), chosen.odds)

    # --- 4. commit ------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Evict what the pass made due, in every layer: it has succeeded, and will not be taken back."""
        self.parts.eviction.commit()
        self.parts.admission.rest()

    # --- a prompt -------------------------------------------------------------------------------------------

    def announce_prompt(self, n_tokens: int, chunk: int) -> int:
        """Announce the length of the prompt; return how many of its tokens to read per pass.

        Eviction and everything fitted to the prompt wait for its end.

        Args:
            chunk: tokens to read at once, where the limits have room for them.
        """
        self.mode.prompt_tokens = n_tokens
        shares = self.parts.eviction.shares
        if shares is not None and shares.passes_by:
            # Read in one pass, every layer is evicted as it is read.
            return max(1, n_tokens)
        return self.parts.admission.fit_chunk(chunk)

    def admit(self, shape: LayerShape, dtype: torch.dtype, n_tokens: int, chunk: int) -> None:
        """Admit a context of `n_tokens` before it is read, in passes of at most `chunk` tokens.

        Raises:
            CapacityError: a limit cannot hold it; nothing was allocated.
        """
        self.store.open_pages(shape, dtype)
        self.parts.admission.admit(shape, n_tokens, chunk)

    def take_text(self, shape: LayerShape, dtype: torch.dtype, fill: Callable[[], None]) -> None:
        """Take over the records of a saved text, which `fill` puts into the store."""
        for layer in self.layers:
            self.store.describe(layer, shape, dtype)
            self.account.record_bytes[layer] = shape.record_bytes
        fill()

    def count_cap(self, layer: int, tokens: int) -> int:
        """Return how many records per KV head a step may read of a layer, of `tokens` that are no padding."""
        return self.parts.budgets.count(tokens, layer)

    # --- lengths --------------------------------------------------------------------------------------------

    def count_tokens(self, layer: int) -> int:
        """Return the tokens a layer was given, evicted ones included."""
        return self.store.seen(layer)

    def list_tokens(self) -> list[int]:
        """Return the tokens that each layer was given."""
        return [self.store.seen(layer) for layer in self.layers]

    def find_fault(self) -> str:
        """Return what is wrong with the numbers of records; nothing where all layers hold the same tokens."""
        return find_fault(self.store)

    def count_sequences(self, layer: int) -> int:
        """Return the sequences of the batch."""
        return self.store.batch(layer)

    # --- a pass that is checked, or fails -------------------------------------------------------------------

    def wait(self) -> None:
        """Wait for every fetch in flight, so that none lands in the middle of another pass."""
        self.store.drain()

    def set_mode(self, *, dense: bool = False, measures: bool = False) -> None:
        """Set what the next passes are for: `dense`, the reference of a verified step; `measures`, the step itself."""
        self.mode.dense, self.mode.measures = dense, measures
        # Bytes moved for verification do not count as part of the run.
        self.account.counts_bytes = not (dense or measures)

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, layer: int, n_tokens: int) -> None:
        """Forget the newest tokens of a layer, and whatever was speculated.

        Raises:
            CacheStateError: what came before them is evicted.
        """
        self.pending.clear()
        crop(self.store, layer, n_tokens)
        if layer == self.layers[0]:
            self.account.take_back_steps(n_tokens)
        self._forget_chosen(layer)

    def cut(self, layer: int, seen: int, *, remembers: bool = False) -> None:
        """Forget a layer's tokens from number `seen` on, however many of its parts have them; it can be repeated.

        Args:
            remembers: but for what steps are verified against.

        Raises:
            CacheStateError: what came before them is evicted.
        """
        self.pending.clear()
        cut_layer(self.store, layer, seen, remembers=remembers)
        self._forget_chosen(layer)

    def _forget_chosen(self, layer: int) -> None:
        if self.store.seen(layer) <= self.dense_tokens:
            self.dense_tokens = NEVER

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.pending.clear()
        self.store.select(layer, sequences)

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        self.pending.clear()
        self.store.clear(layer)
        self.mode.prompt_tokens, self.dense_tokens = 0, NEVER
        self.parts.admission.forget()
        self.parts.eviction.clear()
