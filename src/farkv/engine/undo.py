"""The state a pass starts from, so that a failed pass can be undone: everything it changes except the stored rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from farkv._axes import Tensor
from farkv.engine.step import Engine
from farkv.errors import CacheStateError
from farkv.store.whole import cut_layer, find_fault


class State(NamedTuple):
    """The state of all layers before a pass.

    seen, evicted: tokens that every layer was given, and those of each layer that were evicted.  padding: which tokens
    are seen, now and ever.  sums: scores that a pass adds to.  shares: what layers may keep.  bank: what they have
    read.
    """

    seen: int
    evicted: dict[int, int]
    padding: tuple[Tensor | None, Tensor | None]
    selector: Any
    evictor: Any
    sums: dict[int, Tensor]
    shares: Any
    bank: Any


def note_state(engine: Engine) -> State:
    """Note what a pass changes; only sums are copied, because a pass changes nothing else in place."""
    parts, store = engine.parts, engine.store
    evictor, shares = parts.evictor, parts.eviction.shares
    sums: dict[int, Tensor] = {}
    if evictor is not None and evictor.sums_scores:
        sums = {i: store.kept[i].scores.view().clone() for i in engine.layers if store.length(i) > 0}
    return State(
        store.seen(engine.layers[0]) if engine.layers else 0,
        dict(store.evicted),
        (engine.padding.real, engine.padding.ever),
        engine.selector.snapshot(),
        None if evictor is None else evictor.snapshot(),
        sums,
        None if shares is None else shares.snapshot(),
        parts.bank.snapshot(),
    )


def take_back(engine: Engine, state: State) -> None:
    """Put every layer back to the noted state; it can be repeated, should it be stopped half way.

    Raises:
        CacheStateError: records that were there have been evicted meanwhile, or a layer is otherwise not whole.
    """
    parts, store = engine.parts, engine.store
    # What was on its way near must not arrive in the middle of the next pass.
    engine.wait()
    engine.pending.clear()
    if state.seen and parts.eviction.is_committing:
        raise CacheStateError("evicting was stopped half way")
    parts.eviction.forget_due()
    parts.admission.ask_again()
    for layer in engine.layers:
        if not state.seen and store.evicted[layer]:
            # Before there was nothing, of which nothing can be gone.
            store.clear(layer)
        if store.evicted[layer] != state.evicted[layer]:
            raise CacheStateError(f"layer {layer} has evicted records that the pass found")
        cut_layer(store, layer, state.seen)
    engine.padding.set(*state.padding)
    engine.selector.restore(state.selector)
    if parts.evictor is not None:
        parts.evictor.restore(state.evictor)
    if parts.eviction.shares is not None:
        parts.eviction.shares.restore(state.shares)
    parts.bank.restore(state.bank)
    for layer, sums in state.sums.items():
        store.kept[layer].scores.view().copy_(sums)
    parts.admission.rest()
    fault = find_fault(store)
    if fault:
        raise CacheStateError(f"taking back a failed pass: expected all layers whole, but {fault}; start a new cache")
