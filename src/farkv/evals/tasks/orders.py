"""Several turns over one cache, in every order: whoever chooses once, by a prompt or by its first question, fails.

Four facts at four depths are asked for one after another. A sample's seed decides the order: the first four seeds ask
every fact once at every turn, the first twenty-four ask in all orders.
"""

from __future__ import annotations

from itertools import permutations

from farkv.evals.draw import Draw
from farkv.evals.sample import Made
from farkv.evals.tasks.niah import INTRO, ask_one, state

FACTS = 4


def list_orders() -> list[tuple[int, ...]]:
    """Return all orders; the first ones are those in which every fact is asked once at every turn."""
    shifts = [tuple((i + shift) % FACTS for i in range(FACTS)) for shift in range(FACTS)]
    return [*shifts, *(order for order in permutations(range(FACTS)) if order not in shifts)]


def make(draw: Draw) -> Made:
    """Four facts, at 1/8, 3/8, 5/8 and 7/8 of the text, and their questions in the order of this sample."""
    keys, values = draw.names(FACTS), draw.numbers(FACTS)
    order = list_orders()[draw.sample % len(list_orders())]
    places = [(2 * i + 1) / (2 * FACTS) for i in range(FACTS)]
    needles = [state(key, value) for key, value in zip(keys, values, strict=True)]
    return Made([INTRO, *needles], [ask_one(keys[i], values[i]) for i in order], [0.0, *places])
