"""Join two stores into one batch; shorter sequences are left-padded with rows of zeros.

In: two stores with records of one shape. Out: one store with both batches; the other is empty. Knows rows, not which of
them are real tokens.
"""

from __future__ import annotations

from farkv.errors import CacheStateError
from farkv.store.far.rows import Rows
from farkv.store.ledger import refuse
from farkv.store.sizes import LayerShape, NearNeed
from farkv.store.tiers import Store


def check_join(store: Store, other: Store) -> None:
    """Raise CacheStateError unless both stores are plain pools with records of one shape."""
    for each in (store, other):
        reasons = {
            "one of them is empty": not all(each.length(layer) for layer in each.order),
            "records are on disk or in a session file": each.page_cache is not None,
            "records may be evicted": bool(each.kept),
            "some records are pinned near by a plan": each.pins,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None:
            raise CacheStateError(
                f"join: expected two caches that keep all their records in memory, but {why}; "
                "read both texts as one batch instead"
            )
    forms = [
        [(rows.heads[1], rows.width, rows.dtype) for rows in each.pool.values()]
        + [{i: s.k_dim for i, s in each.shapes.items()}]
        for each in (store, other)
    ]
    if forms[0] != forms[1] or store.device != other.device:
        raise CacheStateError("join: the caches' records differ in shape, type or device; expected one model's")


def admit_join(pair: tuple[Store, Store], shape: LayerShape, tokens: int, need: NearNeed) -> None:
    """Refuse, before anything changes, a joined batch that exceeds what other caches leave of some limit.

    Args:
        pair: the store that both will be in, and the other.
        shape: of every layer of the joined batch.
        need: near bytes of later passes.

    Raises:
        CapacityError: with the bytes needed, the limit and the remedy.
    """
    purpose = f"a batch of {shape.batch} sequences of {tokens} tokens"
    store, other = pair
    n_layers = len(store.pool)
    new = tokens * store.stored_bytes(shape) * shape.batch * shape.kv_heads
    old = sum(max(rows.n_bytes for rows in each.pool.values()) for each in pair)
    # Layers are joined one by one: while one is, its old rows, and those of later layers, still exist; so do old codes.
    total = max(n_layers * new + old, new + n_layers * old)
    besides = need.total + need.index // n_layers
    if store.shares_host:
        total += besides
    for ledger, theirs, wanted in ((store.home, other.home, total), (store.near, other.near, besides)):
        if ledger.limit is None or not (ledger is store.home or store.is_far):
            continue
        held = store.shared.count_others(store, ledger.tier)
        others = max(0, held.held + held.copies - theirs.counted)
        if wanted + others > ledger.limit:
            raise refuse(ledger.tier, ledger.limit, wanted, purpose, others)
        # Nobody else takes it meanwhile.
        ledger.promise(max(ledger.counted, wanted - theirs.counted))
    # Only what was admitted: the next pass decides how far rows may grow.
    store.home.roomy = store.home.limit is None
    store.index.roomy = store.index.roomy and store.near.limit is None


def join_layer(store: Store, other: Store, layer: int) -> None:
    """Join one layer's records. Cost: one copy of both."""
    rows, more = store.pool[layer], other.pool[layer]
    assert isinstance(rows, Rows)
    assert isinstance(more, Rows)
    batches = store.batch(layer), other.batch(layer)
    rows.join(more, max(rows.length, more.length), batches)
    # The recent window is read from the pool again at the next step.
    for each in (store, other) if store.is_far else ():
        each.windows[layer].clear()
        each.buffers.clear()
