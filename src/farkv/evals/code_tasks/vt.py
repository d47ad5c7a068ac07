"""Variable tracking (RULER): which names have a value, directly or through other names."""

from __future__ import annotations

import itertools

from farkv.demo.recall import fact_line
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

HOPS = 4


def make(draw: Draw) -> Made:
    """One chain of four hops, `a = 4821`, `b = a`, `c = b` ..., among plain facts."""
    chain = draw.names(HOPS + 1)
    others = draw.names(max(2, draw.count_lines() - len(chain)))
    value, *values = draw.values(len(others) + 1)
    lines = [fact_line(n, v) for n, v in zip(others, values, strict=True)]
    links = [fact_line(chain[0], value)] + [fact_line(b, a) for a, b in itertools.pairwise(chain)]
    places = sorted(draw.rng.sample(range(len(lines) + len(links)), len(links)))
    for place, link in zip(places, links, strict=True):
        lines.insert(place, link)
    chat = f"Which names hold the value {value}, directly or through other names? Answer with the names alone."
    return Made(lines, [Turn(f"find({value})  # ", chat, " ".join(chain), tuple(chain))])
