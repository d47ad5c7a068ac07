"""One sample of a task: the text, the questions about it, the expected answers.

A task returns `Made`: its own lines and its turns. `lay` puts filler between the lines, so that the sample has the
desired number of tokens with any tokenizer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """One question.

    completion: the prompt for a base model, which continues it with `answer`.  instruction: the prompt for an
    instruction-tuned model.  expected: the strings to find in the answer.  score: a name in `farkv.evals.score`, or
    `none`.  prefix: what a small model's answer is begun with, so that the value comes next (RULER's answer prefix).
    """

    completion: str
    instruction: str
    answer: str
    expected: tuple[str, ...]
    score: str = "all"
    prefix: str = ""


def ask(instruction: str, prefix: str, answer: str, expected: tuple[str, ...], score: str = "all") -> Turn:
    """Return a question in plain words, for chat models, small ones and base models."""
    completion = f"\nQuestion: {instruction}\nAnswer: {prefix}"
    return Turn(completion, instruction, f" {answer}", expected, score, prefix)


class Made(NamedTuple):
    """The output of a task: its lines, in order, and its turns.

    places: position of each line in the text, 0 to 1, ascending; None: random.  filled: False if the lines stay
    together, with filler only before them.  haystack: lines that fill the text, over and over; None: drawn ones.
    n_written: tokens that the full cache writes in answer to the one turn, which has no answer of its own.
    """

    lines: list[str]
    turns: list[Turn]
    places: list[float] | None = None
    filled: bool = True
    haystack: list[str] | None = None
    n_written: int = 0


@dataclass(frozen=True)
class Sample:
    """One text and its turns; `depths` are the positions in the text, 0 to 1, of the lines that the answers need."""

    task: str
    length: int
    seed: int
    text: str
    turns: tuple[Turn, ...]
    depths: tuple[float, ...] = ()
    # For `ppl`: the text that follows, fed token by token.
    continuation: str = ""
    # For `longgen`: tokens that the full cache writes, and all others are fed.
    n_written: int = 0
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def prompt_sha(self) -> str:
        """16 hex digits of the SHA-256 of the model's whole input."""
        parts = [self.text, *(t.completion for t in self.turns), self.continuation]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def lay(made: Made, filler: Sequence[str], rng: random.Random) -> tuple[list[str], list[int]]:
    """Put a task's lines between lines of filler.

    Args:
        made: the task's lines.
        filler: lines, each with its line ending.
        rng: draws the positions if the task does not set them.

    Returns:
        All lines, and the indices of the task's lines.
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
