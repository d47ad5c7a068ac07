"""Refuse what some limit cannot hold, before any layer is touched.

In: the rows and near bytes that a pass will need. Out: nothing, or a CapacityError with the bytes and the remedy.
"""

from __future__ import annotations

from farkv.store.kept import ROW_BYTES
from farkv.store.near import SLOT_BYTES
from farkv.store.sizes import LayerShape, NearNeed, grow_capacity
from farkv.store.tiers import Tiers


def admit(store: Tiers, shape: LayerShape, rows: dict[int, int], need: NearNeed, besides: int = 0) -> None:
    """Refuse, before any layer is touched, what some limit cannot hold.

    Args:
        shape: of every managed layer.
        rows: rows that each layer holds when this forward pass, or the reserved context, is at its widest.
        need: near bytes of this pass at its widest moment; ignored where the pool is near memory.
        besides: bytes that are counted with the records, for verification or while a layer is evicted.

    Raises:
        CapacityError: with the bytes needed, the limit and the remedy.
    """
    total = max(rows.values(), default=0)
    row_bytes = (ROW_BYTES if store.kept else 0) + (SLOT_BYTES if store.holds else 0)
    token_bytes = shape.token_bytes + row_bytes * shape.batch * shape.kv_heads
    grow = [layer for layer, n in rows.items() if (d := store.pool[layer].data) is None or d.shape[2] < n]
    if store.home.limit is not None and (grow or store.shadow):
        held = {layer: count_held(store, layer) for layer in rows}
        # While a layer grows, its old rows are still there.
        kept = sum(n for layer, n in held.items() if layer not in grow) + max(
            (held[layer] for layer in grow), default=0
        )
        end = kept + besides + sum(rows[layer] for layer in grow) * token_bytes
        if end > store.home.limit:
            raise store.home.refuse(end - store.home.used, f"the KV of {total} tokens")
        room = sum(grow_capacity(0, rows[layer]) for layer in grow)
        # What is remembered to verify against grows too.
        spare = besides // 4 + 64 * len(rows) * token_bytes if store.shadow else 0
        store.home.roomy = kept + besides + spare + room * token_bytes <= store.home.limit
    if store.far and store.near.limit is not None:
        if need.total > store.near.limit:
            parts = ", ".join(f"{name} {size:,}" for name, size in need._asdict().items())
            raise store.near.refuse(need.total - store.near.used, f"a context of {total} tokens ({parts})")
        room = grow_capacity(0, total)
        store.index.roomy = need.total + need.index * (room - total) // total <= store.near.limit


def count_held(store: Tiers, layer: int) -> int:
    """Return the bytes that a layer's records and their books take now."""
    kept, held = store.kept.get(layer), store.held.get(layer)
    books = kept.places.n_bytes + kept.marks.n_bytes if kept else 0
    return store.pool[layer].n_bytes + books + (held.slots.n_bytes if held else 0)
