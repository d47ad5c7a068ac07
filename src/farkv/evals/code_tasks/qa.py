"""Questions that paraphrase the text: people, where they were born, what they do, what they own."""

from __future__ import annotations

from typing import NamedTuple

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

CITIES = (
    "lisbon oslo cairo lima paris delhi quito rome seoul dublin madrid athens prague vienna warsaw boston havana "
    "nairobi tokyo berlin"
).split()
JOBS = (
    "baker pilot nurse farmer lawyer miner painter sailor tailor teacher doctor driver gardener singer writer weaver "
    "judge cook dancer plumber"
).split()
THINGS = (
    "boat horse piano clock drum lamp truck violin tent sled kite globe desk ladder mill cart bell rug vase bike"
).split()


class Person(NamedTuple):
    """The facts about one person."""

    name: str
    city: str
    job: str
    thing: str


STATEMENTS = (
    "# {name} was born in {city}, works as a {job} and owns a {thing}.\n",
    "# The {job} {name} comes from {city} and has a {thing}.\n",
    "# {name}, who grew up in {city}, has a {thing} and earns a living as a {job}.\n",
)
QUESTIONS = {
    "city": "From which city is {name}?",
    "job": "What is the job of {name}?",
    "thing": "What belongs to {name}?",
}


def make(draw: Draw) -> Made:
    """One question about one of many people."""
    rng = draw.rng
    names = draw.names(max(3, draw.count_lines() * 2 // 3))
    people = [Person(n, rng.choice(CITIES), rng.choice(JOBS), rng.choice(THINGS)) for n in names]
    lines = [rng.choice(STATEMENTS).format(**p._asdict()) for p in people]
    asked, field = rng.choice(people), rng.choice(list(QUESTIONS))
    question = QUESTIONS[field].format(name=asked.name)
    answer = getattr(asked, field)
    chat = f"{question} Answer with one word."
    return Made(lines, [Turn(f"# {question} Answer: ", chat, answer, (answer,), "any")])
