"""A forward pass as a transaction: what it finds, and the way back to that.

In: a cache before a pass. Out: a `Pass`; undoing it leaves the cache as the pass found it, however far it came. An undo
that was itself stopped can be made again: it sets absolute numbers and notes, and takes nothing away twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from farkv._axes import Tensor
from farkv.engine.step import Engine
from farkv.engine.undo import State, note_state, take_back
from farkv.errors import CacheStateError
from farkv.hf.layer import FarLayer


@dataclass
class Pass:
    """A pass that is neither committed nor undone.

    tokens: of the context before it.  unmanaged: attributes of the layers that are left to Hugging Face.  module: the
    outermost one that was called, by identity: a cache must not hold a model.  ids: what it was called with.
    stage: it was called; the module that reads was; that one is done.
    """

    tokens: int
    unmanaged: dict[int, dict[str, Any]]
    state: State
    module: int
    ids: Tensor | None
    started: float
    stage: Literal["open", "reading", "read"] = "open"
    seconds: float = 0.0

    def is_around(self, ids: Tensor | None) -> bool:
        """Say whether a call of the module that reads, with these ids, is this pass's own.

        A decoder is called with the very tensor that the whole model was called with, or with its embeddings. Anything
        else is another call: this pass was stopped before it came so far.
        """
        return self.stage == "open" and (ids is None or ids is self.ids)


def note_pass(layers: list[Any], engine: Engine, tokens: int, *, module: int, ids: Tensor | None, now: float) -> Pass:
    """Note what a pass finds."""
    # Layers of keys and values get new tensors in every pass: what they hold now stays as it is.
    unmanaged = {
        i: dict(vars(layer))
        for i, layer in enumerate(layers)
        if not isinstance(layer, FarLayer) and not hasattr(layer, "conv_states")
    }
    return Pass(tokens, unmanaged, note_state(engine), module, ids, now)


def undo_pass(layers: list[Any], engine: Engine, found: Pass) -> None:
    """Put everything back to what a pass found.

    Raises:
        CacheStateError: a layer cannot go back: what came before is gone.
    """
    take_back(engine, found.state)
    for i, layer in enumerate(layers):
        if isinstance(layer, FarLayer):
            continue
        if i not in found.unmanaged:
            # Linear attention writes its states in place.
            raise CacheStateError(describe_stuck(layers, i))
        vars(layer).clear()
        vars(layer).update(found.unmanaged[i])


def describe_stuck(layers: list[Any], i: int) -> str:
    """Return why a layer's newest tokens cannot be forgotten."""
    return f"some tokens were to be forgotten and layer {i} ({type(layers[i]).__name__}) cannot step back"


def find_fault(layers: list[Any], engine: Engine) -> str:
    """Return what is wrong with the layers' numbers of tokens, those left to Hugging Face included; nothing if all is
    well.
    """
    fault = engine.find_fault()
    if fault or not engine.layers:
        return fault
    seen = engine.count_tokens(engine.layers[0])
    for i, layer in enumerate(layers):
        # A layer without keys holds a state; one with none yet shares another layer's.
        if isinstance(layer, FarLayer) or getattr(layer, "keys", None) is None or hasattr(layer, "conv_states"):
            continue
        n = layer.get_seq_length()
        if n and n != seen:
            return f"layer {engine.layers[0]} holds {seen} tokens and layer {i} holds {n}"
    return ""
