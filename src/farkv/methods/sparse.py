"""The frame of every recipe: dense while the prompt is read, a choice of records per decode step after that.

Prefill (T > 1): store, observe, attend to all.  Decode (T = 1): store, choose (or take what was speculated),
read, attend to the chosen. A method fills in `choose`, and `observe` and `top_up` where it has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from farkv._axes import Bool, Float32, Int, Tensor
from farkv.math.attention import align_mask, align_rows
from farkv.math.select import Choice, find_recent, limit_pages, select_seen, select_top
from farkv.math.stream import Softmax, Stream
from farkv.methods.contract import Budget, Kernel, Place, Query, Step
from farkv.methods.in_place import InPlace
from farkv.methods.mass import measure_found
from farkv.methods.padding import Padding
from farkv.store.records import Fetch, Read
from farkv.store.sizes import LayerShape


class SparseRecipe(InPlace):
    """A recipe that reads a fraction of the records at decode steps."""

    shape: LayerShape | None

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        super().__init__(place, fraction=fraction, sinks=sinks, window=window, top_up=top_up)
        self.dense = False
        self.pending: dict[int, tuple[Fetch, Budget]] = {}
        # The account's, not ours: a store that knew its recipe would keep both alive until the collector comes.
        self.store.on_fetch, self.store.on_disk = place.account.count_fetch, place.account.count_disk

    # --- what a method fills in -----------------------------------------------------------------------------

    def observe(self, layer: int, step: Step) -> None:
        """Look at a layer's new tokens, prompt or decode, after they are stored."""

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """Choose `budget.early` records among all but the tail, by the layer's true query."""
        raise NotImplementedError

    def top_up(self, layer: int, query: Query, early: Fetch, budget: Budget) -> Choice | None:
        """Choose `budget.late` more, once the true query is known, after speculation."""
        return None

    # --- what can be had at this step -----------------------------------------------------------------------

    def reaches_disk(self, layer: int) -> bool:
        """Say whether some records of a layer cost a read from disk that the cap must also hold for."""
        return self.store.paged and self.share_of(layer) < 1

    def reach(self, layer: int, pooled: Tensor, share: float = 1.0) -> Tensor:
        """Leave in reach what is in memory and, within the layer's share of all pages, what is worth reading."""
        if not self.reaches_disk(layer):
            return pooled
        resident, tokens = self.store.find_resident(layer)
        n_pages = max(1, int(share * self.share_of(layer) * resident.shape[-1]))
        return limit_pages(pooled, resident, tokens, n_pages)

    def pick(self, layer: int, pooled: Float32[Tensor, "B Hkv S"], budget: Budget) -> Choice:
        """Choose the best records that can be had."""
        if not self.reaches_disk(layer):
            return select_top(pooled, budget.early, budget.own_early)
        return select_seen(self.reach(layer, pooled), budget.early, budget.own_early)

    # --- what is each sequence's own ------------------------------------------------------------------------

    def share(self, tokens: int, layer: int) -> Budget:
        """Split a layer's cap for a context of `tokens`; in a padded batch every sequence's as if it were alone."""
        budget = self.split(tokens, layer)
        if self.padding.real is None or budget.early + budget.late + budget.tail >= tokens:
            # Where everything is read, the mask alone hides padding, as in the plain model.
            return budget
        evicted = self.store.evicted[layer]
        rows = self.store.length(layer) + tokens - self.store.seen(layer) if evicted else 0
        key = (self.share_of(layer), evicted, rows)
        return self.padding.share(key, tokens, lambda n, pads: self.split(n, layer, pads))

    def find_open(
        self, layer: int, n_rows: int, budget: Budget
    ) -> tuple[Bool[Tensor, "b h S"] | None, Bool[Tensor, "b h S"] | None]:
        """Return which of the first `n_rows` records are open to choice, and which are read because they are recent.

        None and None where all are open.
        """
        valid = self.visible(layer, n_rows)
        if valid is None or budget.own is None or budget.own.recent is None:
            return valid, None
        recent = find_recent(valid, budget.own.recent)
        return valid & ~recent, recent

    # --- the frame ------------------------------------------------------------------------------------------

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens; the first managed layer admits them for all layers."""
        shape = LayerShape(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.element_size())
        self.account.record_bytes[layer] = shape.record_bytes
        if layer == self.layers[0]:
            self.shape = shape
            self.store.open_pages(shape, k.dtype)
            self.admit(shape, k.shape[2])
        if self.spiller is not None and k.shape[2] > 1:
            self._spill(layer, self.spiller.count_excess(layer, k.shape[2]))
        self.store.append(layer, k, v)

    def wants_estimate(self, layer: int) -> bool:
        """Nothing is speculated unless a method does."""
        return False

    def speculate(self, layer: int, estimate: Query) -> None:
        """Nothing is speculated unless a method does."""

    def attend(self, layer: int, step: Step, kernel: Kernel) -> object:
        """Attend to all records while T > 1 or nothing was stored before, to the chosen ones at a decode step."""
        q = step.query.q
        self.padding.note(step.mask)
        if self.watcher is not None and not self.dense:
            self.watcher.watch(layer, step.query, self.padding.of_tokens(self.store.seen(layer)))
        first = self.store.seen(layer) == q.shape[2]
        if q.shape[2] > 1 or first or self.dense or self.reads_all(layer):
            self.pending.pop(layer, None)
            out = self._attend_all(layer, step, kernel)
        else:
            out = self._attend_chosen(layer, step, kernel)
        if not self.dense:
            self.observe(layer, step)
            self._pull_levers(layer, step)
            if self.spiller is not None:
                self._make_room(layer, step)
        return out

    def _attend_all(self, layer: int, step: Step, kernel: Kernel) -> object:
        q, k, v = step.query.q, step.k, step.v
        total = self.store.seen(layer)
        if q.shape[2] == 1 and total > 1 and not self.dense:
            if self.fast.everywhere and self.reads_in_place(layer, step):
                return self.read_in_place(layer, step, kernel, None, 0)
            self.count_read(layer, k.shape[0] * k.shape[1] * self.store.length(layer), k)
            self.note_read(layer, None, None)
            self._measure(layer, step, None)
        if total == k.shape[2]:
            with self.store.hold((k.numel() + v.numel()) * k.element_size()):
                return kernel(q, k, v, step.mask)
        if self.store.streams:
            return self._attend_blocks(layer, step, kernel)
        with self.store.read_all(layer, whole=self.dense) as (all_k, all_v):
            mask = step.mask
            if mask is not None and all_k.shape[2] < total:
                rows = torch.arange(all_k.shape[2], device=mask.device).expand(*k.shape[:2], -1)
                mask = align_rows(mask, self.store.locate(layer, rows), q.shape[1] // k.shape[1])
            return kernel(q, all_k, all_v, mask)

    def _attend_blocks(self, layer: int, step: Step, kernel: Kernel) -> object:
        """Attend to the records block by block, and to the new tokens, which are near already."""
        query, store, n_new = step.query, self.store, step.k.shape[2]
        stream = Stream(query.q, Softmax(query.scaling, query.softcap, kernel.sinks))
        n_old = store.length(layer) - n_new
        for start, k, v in store.read_blocks(layer, n_old):
            stream.add(k, v, self._see(layer, step, start, start + k.shape[2]))
        with store.hold((step.k.numel() + step.v.numel()) * step.k.element_size()):
            own = None if step.mask is None else step.mask[..., -n_new:]
            # A deliberate sync, once per pass and layer, for the same reason.
            causal = own is None or bool((own == torch.ones_like(own[:1]).tril()).all())
            stream.add(step.k, step.v, None if causal else own, causal=causal)
        return kernel.wrap(stream.finish())

    def _see(self, layer: int, step: Step, start: int, stop: int) -> Tensor | None:
        """Return what the new queries see of the rows from `start` to `stop`, None where all see all."""
        if step.mask is None:
            return None
        if self.store.evicted[layer]:
            rows = torch.arange(start, stop, device=step.mask.device).expand(*step.k.shape[:2], -1)
            n_groups = step.query.q.shape[1] // step.k.shape[1]
            visible = align_rows(step.mask, self.store.locate(layer, rows), n_groups)
        else:
            visible = step.mask[..., start:stop]
        # A deliberate sync, once per block: the fused kernel is faster without a mask.
        return None if bool(visible.all()) else visible

    def _attend_chosen(self, layer: int, step: Step, kernel: Kernel) -> object:
        q, k = step.query.q, step.k
        pending, late = self.pending.pop(layer, None), None
        if pending is None:
            budget = join_late(self.share(self.store.seen(layer), layer))
            in_place = self.reads_in_place(layer, step)
            if in_place and budget.early + budget.tail >= self.store.length(layer):
                return self.read_in_place(layer, step, kernel, None, 0)
            chosen = self.choose(layer, step.query, budget)
            if in_place and chosen.valid is None:
                return self.read_in_place(layer, step, kernel, chosen.positions, budget.tail)
            early = self.store.fetch(layer, chosen.positions, chosen.valid, budget.tail)
        else:
            early, budget = pending
            extra = self.top_up(layer, step.query, early, budget)
            late = None if extra is None else Fetch(extra.positions, extra.valid, None, None)
        if (
            self.store.far
            and early.valid is None
            and (late is None or late.valid is None)
            and self.may_attend(layer, step)
        ):
            return self.read_near(layer, step, kernel, self.store.join(layer, early, late, budget.tail))
        read = self.store.read(layer, early, late, budget.tail)
        if self.spiller is not None:
            self.spiller.note(layer, step.query, read)
        n_read = read.valid.sum() if read.valid is not None else read.positions.numel()
        self.count_read(layer, n_read, k)
        self.note_read(layer, read.positions, read.valid)
        self._measure(layer, step, read)
        mask = step.mask
        if mask is not None or read.valid is not None:
            where = self.store.locate(layer, read.positions)
            mask = align_mask(mask, where, read.valid, q.shape[1] // k.shape[1])
        return kernel(q, read.k, read.v, mask)

    def _measure(self, layer: int, step: Step, read: Read | None) -> None:
        """Measure the true attention mass of a choice, on verified steps only."""
        if self.measuring:
            real = self.padding.of_tokens(self.store.seen(layer))
            self.account.layer(layer).add_mass(*measure_found(self.store, layer, step, read, real))

    # --- a text that was read before ------------------------------------------------------------------------

    @property
    def is_padded(self) -> bool:
        """Say whether some tokens are padding."""
        return self.padding.real is not None

    def take_text(self, shape: LayerShape, dtype: torch.dtype, fill: Callable[[], None]) -> None:
        """Hold records that `fill` puts into the store."""
        self.shape = shape
        for layer in self.layers:
            self.store.describe(layer, shape.k_dim, shape.v_dim, dtype)
            self.account.record_bytes[layer] = shape.record_bytes
        fill()

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest tokens of a layer, and whatever was speculated."""
        self.pending.clear()
        self.store.crop(layer, n_tokens)
        if self.spiller is not None:
            self.spiller.crop(layer)
        self.padding.crop(self.store.seen(layer))
        if self.watcher is not None and not self.dense:
            self.watcher.crop(n_tokens, layer)

    def select(self, sequences: Int[Tensor, " N"], layer: int) -> None:
        """Keep these sequences of the batch, in this order."""
        self.pending.clear()
        self.store.select(layer, sequences)
        if self.spiller is not None:
            self.spiller.select(sequences, layer)
        if self.watcher is not None:
            self.watcher.select(sequences, layer)
        if layer == self.layers[0]:
            self.padding.select(sequences)

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        self.pending.clear()
        self.prompt_tokens, self._admitted = 0, ()
        self.store.clear(layer)
        if self.watcher is not None:
            self.watcher.clear(layer)
        if self.keeper is not None:
            self.keeper.clear(layer)
        if self.spiller is not None:
            self.spiller.clear(layer)
        self.padding = Padding()


def join_late(budget: Budget) -> Budget:
    """Return the budget with all that may be chosen late chosen early."""
    own = budget.own
    if own is not None:
        own = own._replace(early=own.early + own.late, late=torch.zeros_like(own.late))
    return budget._replace(early=budget.early + budget.late, late=0, own=own)
