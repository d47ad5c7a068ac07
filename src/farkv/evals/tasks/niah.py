"""Needles in a haystack (RULER): one sentence among text, among the same sentences over and over, among its likes."""

from __future__ import annotations

from typing import Literal

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn, ask

# Keys of `multikey_1`, values of `multivalue`, questions of `multiquery`, as in RULER.
FOUR = 4
INTRO = "Some sentences of this text say the access code of something. Remember them: you will be asked.\n"
# RULER repeats sentences that say nothing; these are ours.
NOISE = [
    "The road is long.\n", "The rain has stopped.\n", "A bell rings in the valley.\n", "We walk on.\n",
    "Here we are, and there we go again.\n",
]  # fmt: skip
# About the tokens of a needle of numbers, and of identifiers; `Maker.fit` corrects for the model's own.
NEEDLE_TOKENS = {"number": 22, "uuid": 64}
Haystack = Literal["text", "noise", "needles"]
Kind = Literal["name", "number", "uuid"]


def state(key: str, value: str) -> str:
    """Return a needle."""
    return f"The access code of {key} is {value}.\n"


def ask_one(key: str, value: str) -> Turn:
    """Ask for one key's value."""
    instruction = f"What is the access code of {key}? Answer with the code alone."
    return ask(instruction, f"The access code of {key} is", value, (value,))


def draw_kind(draw: Draw, kind: Kind, n: int) -> list[str]:
    """Return `n` distinct keys or values of a kind."""
    return {"name": draw.names, "number": draw.numbers, "uuid": draw.uuids}[kind](n)


def make_single(draw: Draw, haystack: Haystack = "text", value: Kind = "number") -> Made:
    """One needle; in the text, or (`niah_single_1`) among a few sentences over and over."""
    (key,), (found,) = draw.names(1), draw_kind(draw, value, 1)
    return lay_needles(draw, [state(key, found)], [ask_one(key, found)], NOISE if haystack == "noise" else None)


def make_multikey(draw: Draw, haystack: Haystack = "text", key: Kind = "name", value: Kind = "number") -> Made:
    """One of four needles; or one among nothing but needles."""
    many = max(FOUR, draw.length // NEEDLE_TOKENS[value]) if haystack == "needles" else FOUR
    keys, values = draw_kind(draw, key, many), draw_kind(draw, value, many)
    needles = [state(k, v) for k, v in zip(keys, values, strict=True)]
    asked = draw.rng.randrange(FOUR)
    turns = [ask_one(keys[asked], values[asked])]
    return lay_needles(draw, needles[:FOUR], turns, needles[FOUR:] or None)


def make_multivalue(draw: Draw) -> Made:
    """All four codes of one key."""
    (key,), values = draw.names(1), draw.numbers(FOUR)
    instruction = f"What are all the access codes of {key}? Answer with the {FOUR} codes alone."
    turn = ask(instruction, f"The access codes of {key} are", ", ".join(values), tuple(values))
    return lay_needles(draw, [state(key, v) for v in values], [turn])


def make_multiquery(draw: Draw) -> Made:
    """The codes of four keys in one answer."""
    keys, values = draw.names(FOUR), draw.numbers(FOUR)
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    instruction = f"What are the access codes of {listed}? Answer with the codes alone."
    turn = ask(instruction, f"The access codes of {listed} are", ", ".join(values), tuple(values))
    return lay_needles(draw, [state(k, v) for k, v in zip(keys, values, strict=True)], [turn])


def lay_needles(draw: Draw, needles: list[str], turns: list[Turn], haystack: list[str] | None = None) -> Made:
    """Return needles at random places, the introduction before them."""
    places = sorted(draw.rng.random() for _ in needles)
    return Made([INTRO, *needles], turns, [0.0, *places], haystack=haystack)
