"""The state a pass starts from, so that a failed pass can be undone: everything it changes except the stored rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from farkv._axes import Tensor
from farkv.engine.step import Engine


class State(NamedTuple):
    """The state of all layers before a pass; `Engine.crop` takes back the rows.

    real: which tokens are no padding.  sums: scores that a pass adds to.
    """

    real: Tensor | None
    selector: Any
    evictor: Any
    sums: dict[int, Tensor]


def note_state(engine: Engine) -> State:
    """Note what a pass changes; only sums are copied, because a pass changes nothing else in place."""
    evictor, store = engine.parts.evictor, engine.store
    sums: dict[int, Tensor] = {}
    if evictor is not None and evictor.sums_scores:
        sums = {i: store.kept[i].scores.view().clone() for i in engine.layers if store.length(i) > 0}
    noted = None if evictor is None else evictor.snapshot()
    return State(engine.padding.real, engine.selector.snapshot(), noted, sums)


def restore_state(engine: Engine, state: State) -> None:
    """Restore the noted state; the rows must have been cropped to it before."""
    engine.pending.clear()
    engine.padding.set(state.real)
    engine.selector.restore(state.selector)
    if engine.parts.evictor is not None:
        engine.parts.evictor.restore(state.evictor)
    for layer, sums in state.sums.items():
        scores = engine.store.kept[layer].scores
        # If records were evicted meanwhile, the remaining ones keep their current sums.
        if scores.length == sums.shape[2]:
            scores.view().copy_(sums)
