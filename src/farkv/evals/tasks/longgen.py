"""Long generation from far context: follow links that lie scattered in the text, one after another."""

from __future__ import annotations

import itertools

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

STEPS = 16


def make(draw: Draw) -> Made:
    """Lines `apple_river.next = stone_cloud`, in any order; the answer walks sixteen of them."""
    names = draw.names(max(6, draw.count_lines()))
    lines = [f"{a}.next = {b}\n" for a, b in itertools.pairwise(names)]
    draw.rng.shuffle(lines)
    steps = min(STEPS, len(lines))
    start = draw.rng.randint(0, len(lines) - steps)
    found = tuple(names[start + 1 : start + 1 + steps])
    told = (
        f"The text says what comes after each name. Begin at {names[start]} and write the next {steps} names, "
        "separated by spaces, and nothing else."
    )
    turn = Turn(f"walk({names[start]}, {steps})  # ", told, " ".join(found), found, "prefix")
    return Made(lines, [turn])
