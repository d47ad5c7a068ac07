"""A full pool: which records are evicted, by how recently they were read.

In: what passes read, or would read. Out: which records stay when room is needed. Sinks and the recent window are never
evicted. InfiniGen §4.4 has the counter; its prompts always fit, so the votes of a prompt's queries are ours.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.engine.records import LayerRecords
from farkv.math.attention import weigh_rows
from farkv.math.step import Query
from farkv.store.far.eviction import Policy, Uses, make_policy
from farkv.store.far.rows import Rows
from farkv.store.follow import Cropped
from farkv.store.records import Keep, Read
from farkv.store.tiers import BLOCK_TOKENS, Store

# Queries of a prompt's pass that vote, as decode steps would.
VOTERS = 8
# Bytes of one record's use, of the widest policy.
USE_BYTES = 4
# Decoding evicts this share of a layer's records at once: rows move together once for many tokens.
SLACK = 1 / 32


class LayerUses:
    """The policy's memory of one layer: a value per stored row, and the clock's hand. It follows the layer."""

    def __init__(self, store: Store, layer: int, policy: Policy):
        self.store, self.layer, self.policy = store, layer, policy
        self.rows = Rows(store.near if store.is_far else store.home, device=store.device)
        self.hand: Int[Tensor, "B Hkv"] | None = None

    def get(self, now: int) -> Uses:
        """Return the uses of a layer's stored records; new ones start now."""
        batch, heads = self.store.heads(self.layer)
        if self.hand is None:
            self.hand = torch.zeros(batch, heads, dtype=torch.int64, device=self.store.device)
        n_new = self.store.length(self.layer) - self.rows.length
        if n_new > 0:
            fresh = self.policy.start((batch, heads, n_new), now, self.store.device)
            self.rows.append(fresh.values[..., None])
        return Uses(self.rows.view()[..., 0], self.hand)

    def crop(self, now: Cropped) -> None:
        """Forget the newest rows."""
        self.rows.cut(now.length)

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the uses at these positions."""
        assert self.hand is not None
        kept = self.policy.keep(Uses(self.rows.view()[..., 0], self.hand), positions)
        self.rows.keep(positions)
        self.rows.view().copy_(kept.values[..., None])
        self.hand = kept.hand

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.hand is not None:
            self.rows.select(sequences)
            self.hand = self.hand.index_select(0, sequences.to(self.hand.device))

    def clear(self) -> None:
        """Forget everything."""
        self.rows.clear()
        self.hand = None


class PoolPolicy:
    """The pool's policy at work on every layer of one cache."""

    def __init__(self, store: Store, sinks: int, window: int):
        self.store, self.sinks, self.recent = store, sinks, window + 1
        self.policy = make_policy(store.limits.evict)
        # Records of every KV head and layer that the limit has room for; 0: not known yet.
        self.capacity = 0
        self.now = 0
        # Reads of a pass that is not committed yet: positions, which are valid, and weights.
        self._noted: dict[int, list[tuple[Tensor, Tensor | None, Tensor | None]]] = {}
        self.uses = {layer: LayerUses(store, layer, self.policy) for layer in store.order}
        for layer, uses in self.uses.items():
            store.follow(layer, uses)

    def reserve(self, capacity: int, rows: int) -> None:
        """Set the number of rows the limit has room for, and the size of the layers' next allocation."""
        self.capacity = capacity
        for uses in self.uses.values():
            uses.rows.reserve = capacity if uses.rows.data is None else rows

    def may_fit(self, layer: int, n_new: int) -> bool:
        """Say whether the limit, if it is known yet, has room for so many new records beside those that always stay."""
        return 0 < min(self.store.length(layer), self.sinks + self.recent) + n_new <= self.capacity

    def count_excess(self, layer: int, n_new: int, *, spare: bool = False) -> int:
        """Return how many records must go before `n_new` more find room; with `spare` a few more than that."""
        n_rows = self.store.length(layer)
        excess = n_rows + n_new - self.capacity
        if excess <= 0 or not spare:
            return max(0, excess)
        unpinned = n_rows - self.sinks - self.recent
        return min(unpinned, max(excess, int(SLACK * self.capacity)))

    # --- what is read ---------------------------------------------------------------------------------------

    def note(self, layer: int, query: Query, read: Read) -> None:
        """Note what attention reads at a decode step; it counts when the pass is committed."""
        weights = None
        if self.policy.dtype.is_floating_point:
            seen = None if read.valid is None else read.valid[:, :, None]
            weights = weigh_rows(query.q, [read.k], seen, query.logits)[:, :, 0]
        self._noted.setdefault(layer, []).append((read.positions, read.valid, weights))

    def count_noted(self, layer: int) -> None:
        """Count what a layer's attention has read."""
        for positions, valid, weights in self._noted.pop(layer, ()):
            self.now += 1
            self.policy.touch(self.uses[layer].get(self.now), positions, valid, self.now, weights)

    def forget_noted(self) -> None:
        """Count none of it."""
        self._noted = {}

    def vote(self, records: LayerRecords, query: Query, cap: int, own: Int[Tensor, "b 1 1"] | None) -> None:
        """Count the `cap` records that each of the pass's last queries would read.

        Args:
            own: each sequence's own cap, at most `cap`; None where all have the same.

        Cost: VOTERS queries against every key of the layer.
        """
        layer, n_rows, q = records.layer, records.length, query.q[:, :, -VOTERS:]
        n = q.shape[2]
        place = torch.arange(n_rows, device=q.device)
        visible = (place <= place[-n:, None])[None, None]
        real = records.known(n_rows)
        if real is not None:
            visible = visible & real[:, :, None]
        blocks = range(0, n_rows, BLOCK_TOKENS)
        # A block at a time: where records are coded, no more of them are decoded at once.
        keys = (records.keys(s, min(s + BLOCK_TOKENS, n_rows)).to(q.device) for s in blocks)
        weights = weigh_rows(q, keys, visible, query.logits)
        for t in range(n):
            self.now += 1
            best = weights[:, :, t].topk(min(cap, n_rows), -1)
            read = best.values > 0
            if own is not None:
                read &= torch.arange(read.shape[-1], device=read.device) < own
            self.policy.touch(self.uses[layer].get(self.now), best.indices, read, self.now, best.values)

    # --- what goes ------------------------------------------------------------------------------------------

    def choose_kept(self, layer: int, n: int, visible: Bool[Tensor, "B h S"] | None, newest: int = 0) -> Keep:
        """Choose `n` victims of every KV head; return what stays.

        Args:
            newest: records at the end that stay, where the others are enough.
        """
        store, uses = self.store, self.uses[layer].get(self.now)
        n_rows, device = store.length(layer), uses.values.device
        births = store.kept[layer].places.view()[..., 0].to(device)
        n_stay = newest if n_rows - newest - self.sinks >= n else 0
        recent = torch.arange(n_rows, device=device) >= n_rows - max(self.recent, n_stay)
        real = torch.ones(1, 1, n_rows, dtype=torch.bool, device=device) if visible is None else visible
        sinks = real & (real.cumsum(-1) <= self.sinks)
        garbage = None if visible is None else (~visible).expand_as(births)
        victims = self.policy.choose(uses, births, n, (sinks | recent).expand_as(births), garbage)
        stay = torch.ones_like(births, dtype=torch.bool).scatter_(-1, victims, False)
        positions = stay.nonzero()[:, 2].view(*births.shape[:2], n_rows - n)
        # A deliberate sync, once per eviction: behind the last victim nothing is missing.
        gapless = min(n_rows - 1 - int(victims.max()), store.kept[layer].gapless)
        return Keep(positions, torch.zeros(positions.shape, device=device, dtype=torch.float32), gapless)
