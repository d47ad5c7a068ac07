"""Whether all layers hold the same tokens, in every part; and the one way back to fewer of them.

In: a store, perhaps after a pass that was stopped between any two lines. Out: a fault in words; or layers cut to the
tokens that all of them hold.
"""

from __future__ import annotations

from farkv.errors import CacheStateError
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.pool import FarStore
from farkv.store.follow import Cropped


def find_fault(store: FarStore) -> str:
    """Return what is wrong with the layers' numbers of rows; nothing where all is well.

    Cost: a few integers a layer; asked before every pass.
    """
    if store.moving:
        return f"{store.moving} was stopped half way"
    first, seen = None, 0
    for layer, rows in store.pool.items():
        n, kept, shadow = rows.length, store.kept.get(layer), store.shadow.get(layer)
        if first is None:
            first, seen = layer, n + store.evicted[layer]
        elif n + store.evicted[layer] != seen:
            return f"layer {first} holds {seen} and layer {layer} holds {n + store.evicted[layer]}"
        if kept is not None and not kept.places.length == kept.scores.length == n:
            return f"layer {layer} has {n} rows, {kept.places.length} places and {kept.scores.length} scores"
        if shadow is not None and shadow.length != seen:
            return f"layer {layer} remembers {shadow.length} of {seen} tokens"
        if isinstance(rows, PagedRows) and not rows.is_whole:
            return f"layer {layer} has {n} rows and {rows.n_written + rows.open.length} in its pages"
    return ""


def crop(store: FarStore, layer: int, n_tokens: int) -> None:
    """Remove the newest tokens of a layer.

    Raises:
        CacheStateError: tokens before them were evicted.
    """
    cut_layer(store, layer, max(0, store.seen(layer) - n_tokens))


def cut_layer(store: FarStore, layer: int, seen: int, *, remembers: bool = False) -> None:
    """Remove a layer's tokens from number `seen` on, from every part of it, however many each holds.

    Args:
        remembers: leave what is remembered of them: the token comes again, coded, and is compared with this one.

    It can be repeated: a pass may have been stopped between two parts, and so may this.

    Raises:
        CacheStateError: tokens before them were evicted, or are not there.
    """
    evicted = store.evicted[layer]
    n_rows = seen - evicted
    if layer in store.kept:
        store.kept[layer].cut(n_rows, evicted)
    store.pool[layer].cut(n_rows)
    if layer in store.shadow and not remembers:
        store.shadow[layer].cut(seen)
    for follower in store.following(layer):
        follower.crop(Cropped(n_rows, seen))
    if store.seen(layer) != seen:
        raise CacheStateError(
            f"layer {layer}: expected the first {seen} tokens to be left, got {store.seen(layer)}; start a new cache"
        )
