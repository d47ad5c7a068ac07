"""Needles in a haystack (RULER): one fact; one of many; all values of one name; several names at once.

A needle is `apple_river = 4821`, among lines of code or prose.
"""

from __future__ import annotations

from farkv.demo.recall import fact_line, question_line
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

# Values per name, and names per question, as in RULER.
VALUES = 4
QUERIES = 4


def ask_one(name: str, value: str) -> Turn:
    """Ask for the value of one name."""
    chat = f"What number is {name} set to in the text? Answer with the number alone."
    return Turn(question_line(name), chat, value, (value,))


def make_single(draw: Draw) -> Made:
    """One needle, without distractors."""
    (name,) = draw.names(1)
    value = draw.value()
    return Made([fact_line(name, value)], [ask_one(name, value)])


def make_multikey(draw: Draw) -> Made:
    """One needle among needles with other names."""
    names = draw.names(draw.count_lines())
    values = [draw.value() for _ in names]
    asked = draw.rng.randrange(len(names))
    lines = [fact_line(n, v) for n, v in zip(names, values, strict=True)]
    return Made(lines, [ask_one(names[asked], values[asked])])


def make_multivalue(draw: Draw) -> Made:
    """All values of one name, in text order; the other names have several values too."""
    rng = draw.rng
    counts = [VALUES]
    while sum(counts) < max(draw.count_lines(), VALUES + 2):
        counts.append(rng.randint(1, VALUES))
    names = draw.names(len(counts))
    owners = [n for n, c in zip(names, counts, strict=True) for _ in range(c)]
    rng.shuffle(owners)
    values = draw.values(len(owners))
    found = tuple(v for n, v in zip(owners, values, strict=True) if n == names[0])
    chat = f"What are all the numbers that {names[0]} is set to in the text? Answer with the numbers alone, in order."
    turn = Turn(f"print(*{names[0]})  # ", chat, " ".join(found), found)
    return Made([fact_line(n, v) for n, v in zip(owners, values, strict=True)], [turn])


def make_multiquery(draw: Draw) -> Made:
    """The values of several names, asked for in one question."""
    names = draw.names(draw.count_lines())
    values = dict(zip(names, draw.values(len(names)), strict=True))
    asked = draw.rng.sample(names, min(QUERIES, len(names)))
    found = tuple(values[n] for n in asked)
    chat = f"What numbers are {', '.join(asked)} set to in the text? Answer with the numbers alone, in this order."
    turn = Turn(f"print({', '.join(asked)})  # ", chat, " ".join(found), found)
    return Made([fact_line(n, v) for n, v in values.items()], [turn])
