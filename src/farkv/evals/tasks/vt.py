"""Variable tracking (RULER): which names hold a value, directly or through others."""

from __future__ import annotations

import itertools

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, ask
from farkv.evals.tasks.niah import NOISE

HOPS = 4
INTRO = "In this text, variables are set to numbers, or to other variables. Remember which variable holds what.\n"


def make(draw: Draw) -> Made:
    """One chain of four hops, `VAR A = 48213`, `VAR B = VAR A` ..., among a few sentences over and over."""
    names, (value,) = draw.letters(HOPS + 1), draw.numbers(1)
    links = [f"VAR {names[0]} = {value}\n", *(f"VAR {b} = VAR {a}\n" for a, b in itertools.pairwise(names))]
    instruction = (
        f"Which variables hold the value {value}, directly or through other variables? "
        f"There are {HOPS + 1}: answer with their names alone."
    )
    turn = ask(instruction, f"The variables that hold {value} are", ", ".join(names), tuple(names))
    places = sorted(draw.rng.random() for _ in links)
    return Made([INTRO, *links], [turn], [0.0, *places], haystack=NOISE)
