"""The frame of every recipe: dense while the prompt is read, a choice of records per decode step after that.

Prefill (T > 1): store, observe, attend to all.  Decode (T = 1): store, choose (or take what was speculated),
read, attend to the chosen. A method fills in `choose`, and `observe` and `top_up` where it has them.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.config import Source
from farkv.methods.contract import Budget, Kernel, Place, Query, Step
from farkv.methods.hold import Holder
from farkv.methods.keep import Keeper
from farkv.methods.mass import measure_found
from farkv.methods.padding import Padding
from farkv.methods.watch import Watcher
from farkv.per_token.attend import align_mask, align_rows
from farkv.per_token.select import Choice
from farkv.store.admission import admit
from farkv.store.records import Fetch, Needs, Read
from farkv.store.sizes import LayerShape, NearNeed, count_cap, count_forced
from farkv.store.tiers import Tiers


class SparseRecipe:
    """A recipe that reads a fraction of the records at decode steps."""

    query_source: Source | None = None
    # Records live in near memory: what is kept is read whole.
    at_home = False
    wants_one_pass = False

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        self.fraction, self.sinks, self.window, self.share_late = fraction, sinks, window, top_up
        levers = place.levers
        self.store = Tiers(
            place.layers, place.limits, place.device, Needs(window, self.at_home, levers.keep, levers.near is not None)
        )
        scored = levers.xkv is not None and (levers.keep or levers.near is not None)
        self.watcher = Watcher(levers.xkv) if scored and levers.xkv else None
        self.keeper = Keeper(self.watcher, levers.allowed, self.store, window) if self.watcher and levers.keep else None
        self.holder = Holder(self.watcher, levers.near, self.store) if self.watcher and levers.near else None
        self.fetch_shares = levers.fetch
        self.account = place.account
        self.layers = place.layers
        self.least = 1
        self.dense = False
        self.verifying = False
        self.measuring = False
        self.prompt_tokens = 0
        self.padding = Padding()
        self.pending: dict[int, Fetch] = {}
        self.store.on_fetch = self.count_fetch

    # --- what a method fills in -----------------------------------------------------------------------------

    def observe(self, layer: int, step: Step) -> None:
        """Look at a layer's new tokens, prompt or decode, after they are stored."""

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """Choose `budget.early` records among all but the tail, by the layer's true query."""
        raise NotImplementedError

    def top_up(self, layer: int, query: Query, early: Fetch, budget: Budget) -> Choice | None:
        """Choose `budget.late` more, once the true query is known, after speculation."""
        return None

    def index_token_bytes(self, shape: LayerShape) -> int:
        """Bytes that one token adds to a layer's index, all KV heads and sequences."""
        return 0

    def reads_all(self, layer: int) -> bool:
        """Say whether this layer is left dense by design."""
        return False

    def forget(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction: only the records at these positions stay."""

    # --- the frame ------------------------------------------------------------------------------------------

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens; the first managed layer admits them for all layers."""
        shape = LayerShape(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.element_size())
        self.account.record_bytes[layer] = shape.record_bytes
        if layer == self.layers[0]:
            self.admit(shape, k.shape[2])
        self.store.append(layer, k, v)

    def admit(self, shape: LayerShape, n_new: int) -> None:
        """Refuse tokens that a limit cannot hold, before any layer is touched."""
        first = self.layers[0]
        tokens = max(self.store.seen(first) + n_new, self.store.limits.reserve_tokens)
        rows = dict.fromkeys(self.layers, max(self.store.length(first) + n_new, self.store.limits.reserve_tokens))
        besides = 0
        if self.keeper is not None:
            self.keeper.prompt_tokens = self.prompt_tokens
            rows = self.keeper.widest(tokens, n_new)
            besides = self.keeper.count_besides(shape, tokens, n_new, rows)
        if self.keeper is not None and self.verifying:
            self.store.remember_all(tokens)
            # One layer more while what is remembered grows.
            n_layers = len(self.layers) + (0 if self.store.limits.reserve_tokens >= tokens else 1)
            besides += n_layers * tokens * shape.token_bytes
        admit(self.store, shape, rows, self.near_need(shape, n_new), besides)

    def near_need(self, shape: LayerShape, n_new: int) -> NearNeed:
        """Return the near bytes at the widest moments of a pass over `n_new` tokens and of the steps after it."""
        n_layers = len(self.layers)
        tokens = max(self.store.seen(self.layers[0]) + n_new, self.store.limits.reserve_tokens)
        budgets = [self.split(tokens, i) for i in self.layers]
        rows = max(b.early + b.late + b.tail for b in budgets)
        sparse = [i for i in self.layers if not self.reads_all(i)]
        whole = tokens * shape.token_bytes
        index = self.index_token_bytes(shape) * tokens
        return NearNeed(
            # An index that grows stands beside its old self for a moment, one layer at a time.
            index=index * len(sparse) + (0 if self.store.limits.reserve_tokens >= tokens else index),
            window=n_layers * 2 * (self.store.window + 1) * shape.token_bytes,
            prefill=whole if n_new > 1 else 0,
            decode=(2 * rows * shape.token_bytes if sparse else 0)
            + (whole if self.verifying or len(sparse) < n_layers else 0),
            held=0 if self.holder is None else self.holder.count_bytes(shape, tokens),
        )

    def share_of(self, layer: int) -> float:
        """Return the share of the context that a layer may read: the plan's, or the method's own."""
        return self.fraction if self.fetch_shares is None else self.fetch_shares[layer]

    def count_cap(self, tokens: int, layer: int) -> int:
        """Return how many records of every KV head a layer may read of a context of `tokens`."""
        cap = count_cap(self.share_of(layer), tokens, self.least if self.fetch_shares is None else 1)
        if self.store.evicted[layer]:
            # Of an evicted layer there are fewer rows than tokens.
            cap = min(cap, self.store.length(layer) + tokens - self.store.seen(layer))
        return cap

    def split(self, tokens: int, layer: int) -> Budget:
        """Split a layer's cap for a context of `tokens`, the newest included."""
        share = self.share_of(layer)
        cap = self.count_cap(tokens, layer)
        sinks, window = count_forced(cap, self.sinks, self.window, share)
        middle = cap - window - 1
        late = int(self.share_late * (middle - sinks)) if share < 1 else 0
        return Budget(sinks, middle - late, late, window + 1)

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
        with self.store.read_all(layer, whole=self.dense) as (all_k, all_v):
            mask = step.mask
            if mask is not None and all_k.shape[2] < total:
                rows = torch.arange(all_k.shape[2], device=mask.device).expand(*k.shape[:2], -1)
                mask = align_rows(mask, self.store.locate(layer, rows), q.shape[1] // k.shape[1])
            return kernel(q, all_k, all_v, mask)

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

    # --- the books ------------------------------------------------------------------------------------------

    def count_read(self, layer: int, n_records: int | Tensor, k: Tensor) -> None:
        """Count one decode step's records of a layer."""
        held = k.shape[0] * k.shape[1] * self.store.seen(layer)
        self.account.layer(layer).add_read(n_records, held)

    def count_index(self, layer: int, n_bytes: float) -> None:
        """Count index bytes that were scored."""
        self.account.layer(layer).index_bytes += n_bytes

    def count_fetch(self, n_bytes: int) -> None:
        """Count bytes that crossed the link at decode steps."""
        if self.account.decoding and not self.dense and not self.measuring:
            self.account.fetched_bytes += n_bytes

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest tokens of a layer, and whatever was speculated."""
        self.pending.clear()
        self.store.crop(layer, n_tokens)
        self.padding.crop(self.store.seen(layer))
        if self.watcher is not None and not self.dense:
            self.watcher.crop(n_tokens, layer)

    def select(self, sequences: Int[Tensor, " N"], layer: int) -> None:
        """Keep these sequences of the batch, in this order."""
        self.pending.clear()
        self.store.select(layer, sequences)
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
        self.padding = Padding()

    def visible(self, layer: int, n_rows: int) -> Bool[Tensor, "B h S"] | None:
        """Return which of a layer's first `n_rows` stored records are real, None where all are."""
        return self.padding.of_rows(self.store, layer, n_rows)
