"""Turn a task into a sample of a given length: filler around the task's lines, counted in the model's own tokens.

In: a task's name, a length, a seed, a tokenizer. Out: a `Sample`. Filler is code that the demo model was not trained
on, or English prose (`pydoc_data.topics`), both from the running interpreter's own library.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache, cached_property
from importlib import import_module
from typing import Any

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.errors import ConfigError
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Sample, Turn, lay
from farkv.evals.tasks import TASKS

FILLERS = ("code", "english")
# Length of a continuation, and minimum length of a text, in tokens.
CONTINUATION = 64
LEAST_TOKENS = 256
PPL = "ppl"


@cache
def read_prose() -> dict[str, str]:
    """Return the interpreter's help texts: English prose about Python."""
    topics = import_module("pydoc_data.topics").topics
    return {name: text for name, text in sorted(topics.items()) if len(text) > 500}


class Maker:
    """Makes samples for one model's tokenizer, with one kind of filler."""

    def __init__(self, tokenizer: Any, filler: str = "code"):
        if filler not in FILLERS:
            raise ConfigError(f"filler: expected {' or '.join(FILLERS)}, got {filler!r}")
        self.tokenizer, self.filler = tokenizer, filler

    @cached_property
    def files(self) -> dict[str, str]:
        """The texts from which filler is drawn."""
        return read_sources(STDLIB, held_out=True) if self.filler == "code" else read_prose()

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def make(self, task: str, length: int, seed: int) -> Sample:
        """Make a sample whose text, questions and answers have at most `length` tokens together.

        Raises:
            ConfigError: the task is unknown, or the length is too short for it.
        """
        if length < LEAST_TOKENS:
            raise ConfigError(f"length: expected at least {LEAST_TOKENS} tokens, got {length}")
        if task == PPL:
            return self.continue_text(length, seed)
        if task not in TASKS:
            raise ConfigError(f"task: expected one of {', '.join([*TASKS, PPL])}, got {task!r}")
        mixed = mix_seed(task, length, seed)
        made, room = self.fit(TASKS[task], length, mixed)
        lines = draw_filler(self.files, max(0, room), mixed, self.count) if room > 0 else []
        laid, own = lay(made, lines, random.Random(mixed))
        text = "".join(laid)
        return Sample(task, length, seed, text, tuple(made.turns), find_depths(laid, own, made.turns))

    def fit(self, task: Callable[[Draw], Made], length: int, seed: int) -> tuple[Made, int]:
        """Draw a task's lines, fewer and fewer until they fit; return them and the tokens left for filler."""
        size = length
        while size >= LEAST_TOKENS // 4:
            made = task(Draw(seed, size))
            own = self.count("".join(made.lines)) + sum(self.count(t.completion + t.answer) + 2 for t in made.turns)
            if own <= length - 8:
                return made, length - 8 - own
            size = int(size * min(0.95, (length - 8) / own))
        raise ConfigError(f"length: the task does not fit in {length} tokens; use more: --lengths 2048")

    def continue_text(self, length: int, seed: int) -> Sample:
        """Make a `ppl` sample: `length` tokens of text and the continuation."""
        wanted = length + CONTINUATION
        mixed = mix_seed(PPL, length, seed)
        text = "".join(draw_filler(self.files, wanted + 200, mixed, self.count))
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut, end = ends[length - 1][1], ends[min(wanted, len(ends)) - 1][1]
        return Sample(PPL, length, seed, text[:cut], (), continuation=text[cut:end])


def mix_seed(task: str, length: int, seed: int) -> int:
    """Return a seed that is unique to this task, length and sample."""
    return int.from_bytes(hashlib.sha256(f"{task}/{length}/{seed}".encode()).digest()[:6], "big")


def find_depths(lines: list[str], own: list[int], turns: list[Turn]) -> tuple[float, ...]:
    """Return the position of each turn's (first) answer in the text, 0 to 1; -1 if no line contains it literally."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    depths: list[float] = []
    for turn in turns:
        at = next((starts[i] for i in own if turn.expected[0] in lines[i]), None)
        depths.append(-1.0 if at is None else at / max(1, starts[-1]))
    return tuple(depths)
