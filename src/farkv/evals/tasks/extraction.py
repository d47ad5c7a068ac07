"""Context-intensive extraction: a text full of records, all of which are to be written as JSON; scored by field."""

from __future__ import annotations

import json

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, ask
from farkv.evals.tasks.qa import CITIES

# About the tokens of a record in the text and in the answer; both must fit.
RECORD_TOKENS, ANSWER_TOKENS = 24, 28
MONTHS = "January February March April May June July August September October November December".split()
INTRO = "This is a register of parcels, with notes between its entries.\n"


def make(draw: Draw) -> Made:
    """Parcels, each with three fields, between other text; the answer is a JSON list, of hundreds if it is long."""
    rng = draw.rng
    n = max(4, int(0.9 * draw.length / (RECORD_TOKENS + ANSWER_TOKENS)))
    numbers = rng.sample(range(1000, 10_000), n)
    records = [{"parcel": i, "city": rng.choice(CITIES), "kg": rng.randint(2, 60)} for i in numbers]
    lines = [
        f"On {rng.randint(1, 28)} {rng.choice(MONTHS)}, parcel {r['parcel']} went to {r['city']} and weighed "
        f"{r['kg']} kg.\n"
        for r in records
    ]
    answer = json.dumps(records)
    instruction = (
        'Write all parcels of the text, in its order, as one JSON list of objects with the keys "parcel", "city" and '
        '"kg", in one line and without anything else.'
    )
    places = [i / n for i in range(n)]
    return Made([INTRO, *lines], [ask(instruction, "The list:", answer, (answer,), "json")], [0.0, *places])
