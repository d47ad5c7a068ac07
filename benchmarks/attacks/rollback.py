"""Passes that are stopped: by Ctrl-C at any line, twice, by an error in a layer, by a thread that does not start."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from typing import Any

from farkv import FarKVError

from .base import Attack, Verdict
from .stage import EVICTING, PLACES, Calm, Interrupt, Place, attach, draw_text, go_on, make_cache, read


def interrupt_anywhere(rng: random.Random, *, times: int = 1, names: tuple[str, ...] = tuple(PLACES)) -> Verdict:
    """Stop a pass at a line of farkv's code, and what comes then at further ones; then go on, the same pass first."""
    place = PLACES[rng.choice(names)]
    with attach(place) as far:
        pieces = draw_text(rng)
        calm = Calm(far, place, pieces)
        at = rng.randrange(len(pieces))
        n_lines = count_lines(far, place, pieces, at)
        cache = make_cache(far, place, pieces)
        if go_on(far, cache, pieces[:at], calm, 0) != "right":
            return "wrong"
        with suppress(KeyboardInterrupt, FarKVError), Interrupt(rng.randrange(n_lines)):
            read(far, cache, pieces[at])
        for _ in range(times - 1):
            # While it is taken back, or in the pass after that.
            with suppress(KeyboardInterrupt, FarKVError), Interrupt(rng.randrange(rng.choice([200, n_lines]))):
                read(far, cache, pieces[at])
        return after_stop(far, cache, pieces, calm, at)


def count_lines(far: Any, place: Place, pieces: list[Any], at: int) -> int:
    """Return how many lines of farkv's a pass runs."""
    cache = make_cache(far, place, pieces)
    for ids in pieces[:at]:
        read(far, cache, ids)
    with Interrupt() as counter:
        read(far, cache, pieces[at])
    return max(1, counter.seen)


def after_stop(far: Any, cache: Any, pieces: list[Any], calm: Calm, at: int) -> Verdict:
    """Go on after a stopped pass: a pass whose last lines were stopped may be over, as the cache's length says."""
    done = cache.get_seq_length() == sum(ids.shape[1] for ids in pieces[: at + 1])
    return go_on(far, cache, pieces, calm, at + done)


def stop_in_a_layer(rng: random.Random, names: tuple[str, ...]) -> Verdict:
    """Raise in a module of the model in the middle of a pass, in every pass; then run it again."""
    place = PLACES[rng.choice(names)]
    with attach(place) as far:
        pieces = draw_text(rng)
        calm, cache = Calm(far, place, pieces), make_cache(far, place, pieces)
        layers = far.blocks
        for i, ids in enumerate(pieces):
            error = rng.choice([KeyboardInterrupt, RuntimeError, MemoryError, SystemExit])
            module = rng.choice([rng.choice(list(layers)), far.model.lm_head, rng.choice(list(layers)).mlp])

            def fail(*args: Any, error: type[BaseException] = error) -> None:
                raise error

            hook = module.register_forward_hook(fail)
            with suppress(error, FarKVError):
                read(far, cache, ids)
            hook.remove()
            said = go_on(far, cache, pieces[: i + 1], calm, i)
            if said != "right":
                return said
    return "right"


def refuse_threads(rng: random.Random) -> Verdict:
    """Let the system refuse new threads from the middle of a text on, and in the undoing of a pass."""
    place = PLACES[rng.choice(["near", "near, tight", "disk", "hybrid", "int8"])]
    with attach(place) as far:
        pieces = draw_text(rng)
        calm = Calm(far, place, pieces)
        cache, at = make_cache(far, place, pieces), rng.randrange(len(pieces))
        if go_on(far, cache, pieces[:at], calm, 0) != "right":
            return "wrong"
        start, layer = threading.Thread.start, rng.choice(list(far.blocks))

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        def fail(*args: Any) -> None:
            raise ValueError

        # A forked process, or a thread that died: there is none yet that could do the work.
        cache.engine.store.link._worker = None
        hook = layer.register_forward_hook(fail)
        threading.Thread.start = refuse  # type: ignore[method-assign]
        try:
            with suppress(ValueError, RuntimeError, FarKVError):
                read(far, cache, pieces[at])
        finally:
            threading.Thread.start = start  # type: ignore[method-assign]
            hook.remove()
        return after_stop(far, cache, pieces, calm, at)


ATTACKS = {
    "ctrl_c": Attack(1, "Ctrl-C at any line of a pass, in 17 places", interrupt_anywhere, 12, 120),
    "ctrl_c_twice": Attack(
        1, "Ctrl-C, and again while that is undone", lambda rng: interrupt_anywhere(rng, times=2), 12, 120
    ),
    "ctrl_c_storm": Attack(1, "Ctrl-C five times in a row", lambda rng: interrupt_anywhere(rng, times=5), 8, 60),
    "no_thread": Attack(1, "the system refuses threads in the middle of a text", refuse_threads, 3, 30),
    "errors": Attack(
        1, "an error or Ctrl-C in a layer or the head, in every pass", lambda rng: stop_in_a_layer(rng, tuple(PLACES)),
        4, 40,
    ),
    "evicting": Attack(
        2, "the same where records are evicted", lambda rng: stop_in_a_layer(rng, EVICTING), 6, 60
    ),
}  # fmt: skip
