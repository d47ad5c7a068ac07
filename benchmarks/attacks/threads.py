"""Threads: two on one cache, two caches on one model, a cache that wanders from thread to thread."""

from __future__ import annotations

import random
import threading
from typing import Any

import torch

from farkv import FarKVError

from .base import Attack, Verdict
from .stage import PLACES, Calm, Place, attach, draw_text, go_on, make_cache

QUIET = tuple(name for name in PLACES if name != "verified")


def share_one_cache(rng: random.Random) -> Verdict:
    """Let two threads decode on one cache at once: each must get its own answers, or be refused."""
    place = PLACES[rng.choice(QUIET)]
    with attach(place) as far:
        pieces = draw_text(rng)
        calm, cache = Calm(far, place, pieces), make_cache(far, place, pieces)
        n_before = rng.choice([0, 2, 3])
        if go_on(far, cache, pieces[:n_before], calm, 0) != "right":
            return "wrong"
        # Both are there until both are done: none can inherit from the other.
        said = run_at_once([lambda: go_on(far, cache, pieces, calm, n_before)] * 2)
        return "wrong" if "wrong" in said else "refused" if "refused" in said else "right"


def share_one_model(rng: random.Random) -> Verdict:
    """Let two threads, each with a cache of its own, read different texts through one model."""
    place = PLACES[rng.choice(QUIET)]
    with attach(place) as far:
        texts = [draw_text(rng) for _ in range(2)]
        calms = [Calm(far, place, pieces) for pieces in texts]

        def work(place: Place, i: int) -> Verdict:
            try:
                cache = make_cache(far, place, texts[i])
            except FarKVError:
                return "refused"
            return go_on(far, cache, texts[i], calms[i], 0, alone=False)

        said = run_at_once([lambda: work(place, 0), lambda: work(place, 1)])
        # Over a limit that is for one cache, the second may be refused; at a wrong answer nothing helps.
        return "wrong" if "wrong" in said else "refused" if "refused" in said else "right"


def wander(rng: random.Random) -> Verdict:
    """Run every pass in a thread of its own, one after the other, each ended before the next: nothing is refused."""
    place = PLACES[rng.choice(QUIET)]
    with attach(place) as far:
        pieces = draw_text(rng)
        calm, found, cache = Calm(far, place, pieces), list[Verdict](), make_cache(far, place, pieces)
        for at in range(len(pieces)):

            def work(at: int = at) -> None:
                torch.set_grad_enabled(False)
                found.append(go_on(far, cache, pieces[: at + 1], calm, at))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return "right" if set(found) == {"right"} else "wrong"


def run_at_once(works: list[Any]) -> list[Verdict]:
    """Run these in threads that start, and end, together."""
    begin, end = threading.Barrier(len(works)), threading.Barrier(len(works))
    said: list[Verdict] = []

    def run(work: Any) -> None:
        begin.wait()
        try:
            with torch.no_grad():
                said.append(work())
        except Exception:
            said.append("wrong")
        finally:
            end.wait()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


ATTACKS = {
    "one_cache": Attack(3, "two threads decode on one cache", share_one_cache, 4, 30),
    "one_model": Attack(3, "two threads, two caches, one model", share_one_model, 4, 30),
    "wander": Attack(3, "every pass in another thread", wander, 2, 15),
}
