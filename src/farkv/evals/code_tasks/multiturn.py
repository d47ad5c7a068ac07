"""Several consecutive questions over one cache: later ones may need records that earlier ones did not."""

from __future__ import annotations

from farkv.demo.recall import fact_line
from farkv.evals.code_tasks.niah import ask_one
from farkv.evals.draw import Draw
from farkv.evals.sample import Made

TURNS = 5


def make(draw: Draw) -> Made:
    """Many facts; five questions about them, in random order."""
    names = draw.names(max(TURNS, draw.count_lines()))
    values = dict(zip(names, draw.values(len(names)), strict=True))
    asked = draw.rng.sample(names, TURNS)
    return Made([fact_line(n, v) for n, v in values.items()], [ask_one(n, values[n]) for n in asked])
