"""Long generation that depends on the whole context: follow a chain of links scattered in the text."""

from __future__ import annotations

import itertools

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

STEPS = 16


def make(draw: Draw) -> Made:
    """Lines like `apple_river.next = stone_cloud` in random order; the answer follows sixteen of them."""
    names = draw.names(max(6, draw.count_lines()))
    lines = [f"{a}.next = {b}\n" for a, b in itertools.pairwise(names)]
    draw.rng.shuffle(lines)
    steps = min(STEPS, len(lines))
    start = draw.rng.randint(0, len(lines) - steps)
    found = tuple(names[start + 1 : start + 1 + steps])
    chat = (
        f"The text says what comes after each name. Begin at {names[start]} and write the next {steps} names, "
        "separated by spaces, and nothing else."
    )
    turn = Turn(f"walk({names[start]}, {steps})  # ", chat, " ".join(found), found, "prefix")
    return Made(lines, [turn])
