"""A full pool: which records go, by what was read of late.

The steps (InfiniGen §4.4 has the counter; its prompts always fit, so votes while the prompt is read are ours):
  every pass       vote: the pass's last queries say which records they would read     (`math.attention`)
  every step       note: what attention read                                           (`store.eviction`)
  no room          choose victims, never sinks nor the recent window; padding first    (`store.eviction`)
                   their slots and index entries go in the same call                   (`methods.sparse`)
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.math.attention import weigh_rows
from farkv.methods.contract import Query
from farkv.methods.padding import Padding
from farkv.store.far.eviction import Marks, make_policy
from farkv.store.far.kept import ROW_BYTES
from farkv.store.far.rows import Rows
from farkv.store.records import Keep, Read
from farkv.store.sizes import LayerShape, grow_capacity
from farkv.store.tiers import BLOCK_TOKENS, Tiers

# Queries of a prompt's pass that vote, as decode steps would.
VOTERS = 8
# Bytes of a mark, of the widest policy.
MARK_BYTES = 4
# Decoding evicts this share of a layer's records at once: rows move together once for many tokens.
SLACK = 1 / 32


class Spiller:
    """The pool's policy at work on every layer of one cache."""

    def __init__(self, store: Tiers, sinks: int, window: int):
        self.store, self.sinks, self.recent = store, sinks, window + 1
        self.policy = make_policy(store.limits.evict)
        self.ledger = store.near if store.far else store.home
        # Records of every KV head and layer that the limit has room for; 0: not known yet.
        self.capacity = 0
        self.marks: dict[int, Rows] = {}
        self.hands: dict[int, Tensor] = {}
        self.now = 0

    # --- how many -------------------------------------------------------------------------------------------

    def widest(self, shape: LayerShape, tokens: int, at_once: int, near_token_bytes: int) -> dict[int, int]:
        """Return the rows that every layer holds when a context of `tokens` is at its widest.

        Args:
            at_once: tokens of one pass.
            near_token_bytes: what a token takes of the pool's limit besides its record.

        Raises:
            CapacityError: the pool cannot hold one pass beside what is never evicted.
        """
        home, layers = self.store.home, list(self.store.order)
        if self.capacity == 0:
            assert home.limit is not None
            record_bytes = self.store.stored_bytes(shape) + ROW_BYTES + MARK_BYTES
            row_bytes = record_bytes * shape.batch * shape.kv_heads
            # While a layer grows, its old rows are still there; what was announced is allocated at once.
            growing, whole = (home.limit // (n * row_bytes + near_token_bytes) for n in (len(layers) + 1, len(layers)))
            self.capacity = max(growing, min(self.store.limits.reserve_tokens, whole))
        pinned = self.sinks + self.recent
        least = max(at_once + min(self.store.length(layers[0]), pinned), min(tokens, 1 + pinned))
        if least > self.capacity:
            needed = (home.limit or 0) * least // max(1, self.capacity)
            raise home.refuse(
                needed - home.used, f"{at_once} tokens read at once (fewer: generate(prefill_chunk_size=...))"
            )
        rows = min(tokens, self.capacity)
        if grow_capacity(0, rows) > self.capacity:
            # A layer that grows with room to spare must not take what the others will need.
            rows = self.capacity
        self.store.reserve(dict.fromkeys(layers, rows))
        for marks in self.marks.values():
            marks.reserve = rows
        return dict.fromkeys(layers, rows)

    def count_excess(self, layer: int, n_new: int, *, spare: bool = False) -> int:
        """Return how many records must go before `n_new` more find room; with `spare` a few more than that."""
        n_rows = self.store.length(layer)
        excess = n_rows + n_new - self.capacity
        if excess <= 0 or not spare:
            return max(0, excess)
        unpinned = n_rows - self.sinks - self.recent
        return min(unpinned, max(excess, int(SLACK * self.capacity)))

    # --- what is read ---------------------------------------------------------------------------------------

    def of_layer(self, layer: int) -> Marks:
        """Return the marks of a layer's stored records; new ones are marked first."""
        batch, heads = self.store.heads(layer)
        marks = self.marks.get(layer)
        if marks is None:
            marks = self.marks[layer] = Rows(self.ledger, device=self.store.device, reserve=self.capacity)
            self.hands[layer] = torch.zeros(batch, heads, dtype=torch.int64, device=self.store.device)
        n_new = self.store.length(layer) - marks.length
        if n_new > 0:
            fresh = self.policy.start((batch, heads, n_new), self.now, self.store.device)
            marks.append(fresh.values[..., None])
        return Marks(marks.view()[..., 0], self.hands[layer])

    def note(self, layer: int, query: Query, read: Read) -> None:
        """Mark what attention reads at a decode step."""
        self.now += 1
        weights = None
        if self.policy.dtype.is_floating_point:
            seen = None if read.valid is None else read.valid[:, :, None]
            weights = weigh_rows(query.q, [read.k], seen, query.scaling, query.softcap)[:, :, 0]
        self.policy.touch(self.of_layer(layer), read.positions, read.valid, self.now, weights)

    def vote(self, layer: int, query: Query, cap: int, own: Int[Tensor, "b 1 1"] | None, padding: Padding) -> None:
        """Let the pass's last queries mark the `cap` records that each would read.

        Args:
            own: each sequence's own cap, at most `cap`; None where all have the same.

        Cost: VOTERS queries against every key of the layer.
        """
        n_rows, q = self.store.length(layer), query.q[:, :, -VOTERS:]
        n = q.shape[2]
        place = torch.arange(n_rows, device=q.device)
        visible = (place <= place[-n:, None])[None, None]
        real = padding.of_rows(self.store, layer, n_rows)
        if real is not None:
            visible = visible & real[:, :, None]
        blocks = range(0, n_rows, BLOCK_TOKENS)
        # A block at a time: where records are coded, no more of them are decoded at once.
        keys = (self.store.keys(layer, s, min(s + BLOCK_TOKENS, n_rows)).to(q.device) for s in blocks)
        weights = weigh_rows(q, keys, visible, query.scaling, query.softcap)
        for t in range(n):
            self.now += 1
            best = weights[:, :, t].topk(min(cap, n_rows), -1)
            read = best.values > 0
            if own is not None:
                read &= torch.arange(read.shape[-1], device=read.device) < own
            self.policy.touch(self.of_layer(layer), best.indices, read, self.now, best.values)

    # --- what goes ------------------------------------------------------------------------------------------

    def choose_kept(self, layer: int, n: int, visible: Bool[Tensor, "B h S"] | None, newest: int = 0) -> Keep:
        """Choose `n` victims of every KV head; return what stays.

        Args:
            newest: records at the end that stay, where the others are enough.
        """
        store, marks = self.store, self.of_layer(layer)
        n_rows, device = store.length(layer), marks.values.device
        births = store.kept[layer].places.view()[..., 0].to(device)
        n_stay = newest if n_rows - newest - self.sinks >= n else 0
        recent = torch.arange(n_rows, device=device) >= n_rows - max(self.recent, n_stay)
        real = torch.ones(1, 1, n_rows, dtype=torch.bool, device=device) if visible is None else visible
        sinks = real & (real.cumsum(-1) <= self.sinks)
        garbage = None if visible is None else (~visible).expand_as(births)
        victims = self.policy.choose(marks, births, n, (sinks | recent).expand_as(births), garbage)
        stay = torch.ones_like(births, dtype=torch.bool).scatter_(-1, victims, False)
        positions = stay.nonzero()[:, 2].view(*births.shape[:2], n_rows - n)
        kept = self.policy.keep(marks, positions)
        self.marks[layer].keep(positions)
        self.marks[layer].view().copy_(kept.values[..., None])
        self.hands[layer] = kept.hand
        # A deliberate sync, once per eviction: behind the last victim nothing is missing.
        gapless = min(n_rows - 1 - int(victims.max()), store.kept[layer].gapless)
        return Keep(positions, torch.zeros(positions.shape, device=device), gapless)

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, layer: int) -> None:
        """Follow the layer after its newest records were forgotten."""
        marks = self.marks.get(layer)
        if marks is not None:
            marks.crop(max(0, marks.length - self.store.length(layer)))

    def select(self, sequences: Tensor, layer: int) -> None:
        """Keep these sequences of the batch, in this order."""
        if layer in self.marks:
            self.marks[layer].select(sequences)
            self.hands[layer] = self.hands[layer].index_select(0, sequences.to(self.hands[layer].device))

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        if layer in self.marks:
            self.marks.pop(layer).clear()
            self.hands.pop(layer)
