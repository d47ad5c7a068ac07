"""The frame of every recipe: dense while the prompt is read, a choice of records per decode step after that.

Prefill (T > 1): store, observe, attend to all.  Decode (T = 1): store, choose (or take what was speculated),
read, attend to the chosen. A method fills in `choose`, and `observe` and `top_up` where it has them.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.methods.contract import Budget, Kernel, Place, Query, Step
from farkv.methods.limited import Limited
from farkv.methods.mass import measure_found
from farkv.methods.padding import Padding
from farkv.per_token.attend import align_mask, align_rows
from farkv.per_token.select import Choice, limit_pages, select_seen, select_top
from farkv.per_token.stream import Softmax, Stream
from farkv.store.records import Fetch, Read
from farkv.store.sizes import LayerShape


class SparseRecipe(Limited):
    """A recipe that reads a fraction of the records at decode steps."""

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        super().__init__(place, fraction=fraction, sinks=sinks, window=window, top_up=top_up)
        self.dense = False
        self.measuring = False
        self.padding = Padding()
        self.pending: dict[int, Fetch] = {}
        self.store.on_fetch, self.store.on_disk = self.count_fetch, self.count_disk

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

    def pick(self, layer: int, pooled: Tensor, cap: int) -> Choice:
        """Choose the best records that can be had."""
        if not self.reaches_disk(layer):
            return select_top(pooled, cap)
        return select_seen(self.reach(layer, pooled), cap)

    def forget(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction: only the records at these positions stay."""

    # --- the frame ------------------------------------------------------------------------------------------

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens; the first managed layer admits them for all layers."""
        shape = LayerShape(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.element_size())
        self.account.record_bytes[layer] = shape.record_bytes
        if layer == self.layers[0]:
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
            self.count_read(layer, k.shape[0] * k.shape[1] * self.store.length(layer), k)
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
            rows = torch.arange(start, start + k.shape[2], device=query.q.device).expand(*k.shape[:2], -1)
            stream.add(k, v, self._see(layer, step, rows))
        with store.hold((step.k.numel() + step.v.numel()) * step.k.element_size()):
            own = None if step.mask is None else step.mask[..., -n_new:]
            # A deliberate sync, once per pass and layer, for the same reason.
            causal = own is None or bool((own == torch.ones_like(own[:1]).tril()).all())
            stream.add(step.k, step.v, None if causal else own, causal=causal)
        return kernel.wrap(stream.finish())

    def _see(self, layer: int, step: Step, rows: Int[Tensor, "B Hkv K"]) -> Tensor | None:
        """Return what the new queries see of stored rows, None where all see all."""
        if step.mask is None:
            return None
        if self.store.evicted[layer]:
            n_groups = step.query.q.shape[1] // step.k.shape[1]
            visible = align_rows(step.mask, self.store.locate(layer, rows), n_groups)
        else:
            visible = step.mask[..., rows[0, 0]]
        # A deliberate sync, once per block: the fused kernel is faster without a mask.
        return None if bool(visible.all()) else visible

    def _attend_chosen(self, layer: int, step: Step, kernel: Kernel) -> object:
        q, k = step.query.q, step.k
        budget = self.split(self.store.seen(layer), layer)
        early = self.pending.pop(layer, None)
        late = None
        if early is None:
            budget = budget._replace(early=budget.early + budget.late, late=0)
            chosen = self.choose(layer, step.query, budget)
            early = self.store.fetch(layer, chosen.positions, chosen.valid, budget.tail)
        else:
            extra = self.top_up(layer, step.query, early, budget)
            late = None if extra is None else Fetch(extra.positions, extra.valid, None, None)
        read = self.store.read(layer, early, late, budget.tail)
        if self.spiller is not None:
            self.spiller.note(layer, step.query, read)
        n_read = read.valid.sum() if read.valid is not None else read.positions.numel()
        self.count_read(layer, n_read, k)
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

    # --- the levers -----------------------------------------------------------------------------------------

    def _pull_levers(self, layer: int, step: Step) -> None:
        """At the end of the prompt evict and hold near; later evict where the next token would find no room."""
        keeper, seen = self.keeper, self.store.seen(layer)
        if step.k.shape[2] > 1 or seen <= self.prompt_tokens:
            if seen < self.prompt_tokens:
                return
            ready = (
                [layer] if keeper is None else keeper.end_prompt(layer, self.visible(layer, self.store.length(layer)))
            )
            for i in ready:
                self._evict(i, room=0 if keeper is None else keeper.room(i))
                if self.holder is not None:
                    self.holder.end_prompt(i, self.visible(i, self.store.length(i)))
        elif keeper is not None and keeper.is_over(layer):
            keeper.mark(layer, self.visible(layer, self.store.length(layer)))
            self._evict(layer, room=keeper.slack(layer))

    def _evict(self, layer: int, room: int) -> None:
        """Drop the least of what was scored just now."""
        if self.keeper is None:
            return
        # What is freed is what no later step will need.
        final = max(self.store.seen(layer), self.store.limits.reserve_tokens)
        self.store.reserve({layer: self.keeper.count(layer, final)})
        kept = self.keeper.choose_stored(layer, self.visible(layer, self.store.length(layer)), room)
        if kept is not None:
            self.forget(layer, kept.positions)
            self.store.evict(layer, kept)

    # --- a full pool ----------------------------------------------------------------------------------------

    def _make_room(self, layer: int, step: Step) -> None:
        """Let the prompt's last queries say what is used; while decoding, evict where the next token has no room."""
        assert self.spiller is not None
        if step.k.shape[2] > 1 or self.reads_all(layer):
            self.spiller.vote(layer, step.query, self.count_cap(self.store.seen(layer), layer), self.padding)
        if step.k.shape[2] == 1:
            self._spill(layer, self.spiller.count_excess(layer, 1))

    def _spill(self, layer: int, n: int) -> None:
        """Evict `n` records of every KV head by the pool's policy, from the index and the pool together."""
        if n > 0:
            assert self.spiller is not None
            kept = self.spiller.choose_kept(layer, n, self.visible(layer, self.store.length(layer)))
            self.forget(layer, kept.positions)
            self.store.evict(layer, kept)

    # --- the books ------------------------------------------------------------------------------------------

    def count_fetch(self, n_bytes: int) -> None:
        """Count bytes that crossed the link at decode steps."""
        if self.account.decoding and not self.dense and not self.measuring:
            self.account.fetched_bytes += n_bytes

    def count_disk(self, n_bytes: int) -> None:
        """Count bytes that were read from disk at decode steps."""
        if self.account.decoding and not self.dense and not self.measuring:
            self.account.disk_bytes += n_bytes

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
        self.prompt_tokens = 0
        self.store.clear(layer)
        if self.watcher is not None:
            self.watcher.clear(layer)
        if self.keeper is not None:
            self.keeper.clear(layer)
        if self.spiller is not None:
            self.spiller.clear(layer)
        self.padding = Padding()

    def visible(self, layer: int, n_rows: int) -> Bool[Tensor, "B h S"] | None:
        """Return which of a layer's first `n_rows` stored records are real, None where all are."""
        return self.padding.of_rows(self.store, layer, n_rows)
