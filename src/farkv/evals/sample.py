"""One sample of a task: the text, the questions asked of it, the answers expected.

A task makes `Made`: its own lines and its turns. `lay` puts filler between the lines, so that the sample has the
wanted number of tokens whatever the tokenizer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """One question.

    completion: how a base model is asked; it goes on with `answer`.  instruction: the same for a model that was taught
    to follow instructions.  expected: what is looked for in the answer.  score: a name of `farkv.evals.score`.
    """

    completion: str
    instruction: str
    answer: str
    expected: tuple[str, ...]
    score: str = "all"


class Made(NamedTuple):
    """What a task draws: its lines, in order, and its turns.

    places: where each line goes in the text, 0 to 1, ascending; None: at random.  filled: False where the lines are
    the whole text and filler only stands before them.
    """

    lines: list[str]
    turns: list[Turn]
    places: list[float] | None = None
    filled: bool = True


@dataclass(frozen=True)
class Sample:
    """One text and its turns; `depths` says where in the text, 0 to 1, the lines that the answers need stand."""

    task: str
    length: int
    seed: int
    text: str
    turns: tuple[Turn, ...]
    depths: tuple[float, ...] = ()
    # Of `ppl`: what follows the text, fed token by token.
    continuation: str = ""
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def prompt_sha(self) -> str:
        """Return 16 hex digits of the SHA-256 of everything a model is given."""
        parts = [self.text, *(t.completion for t in self.turns), self.continuation]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def lay(made: Made, filler: Sequence[str], rng: random.Random) -> tuple[list[str], list[int]]:
    """Put a task's lines between lines of filler.

    Args:
        made: the task's own lines.
        filler: lines, each with its line end.
        rng: decides the places where the task does not.

    Returns:
        All lines, and which of them are the task's.
    """
    n = len(made.lines)
    if not made.filled:
        return [*filler, *made.lines], list(range(len(filler), len(filler) + n))
    places = made.places if made.places is not None else sorted(rng.random() for _ in range(n))
    lines: list[str] = []
    own: list[int] = []
    start = 0
    for place, line in zip(places, made.lines, strict=True):
        cut = max(start, round(place * len(filler)))
        lines += filler[start:cut]
        own.append(len(lines))
        lines.append(line)
        start = cut
    return [*lines, *filler[start:]], own


def fit_filler(draw: Callable[[int], Sequence[str]], made: Made, length: int, count: Callable[[str], int]) -> list[str]:
    """Draw filler so that text and longest question are at most `length` tokens together.

    Args:
        draw: returns consecutive lines of about so many tokens.
        made: the task's lines and turns.
        length: tokens wanted.
        count: tokens of a text.
    """
    own = count("".join(made.lines)) + sum(count(t.completion + t.answer) + 2 for t in made.turns)
    return list(draw(max(0, length - own - 8)))
