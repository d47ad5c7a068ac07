"""Turn a task into a sample of a given length: filler around the task's lines, counted in the model's own tokens.

In: a task's name, a length, a seed, a tokenizer. Out: a `Sample`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import cycle
from typing import Any

from farkv.errors import ConfigError
from farkv.evals.code_tasks import CODE_TASKS
from farkv.evals.draw import Draw, join_hyphen
from farkv.evals.fillers import draw_lines
from farkv.evals.sample import Made, Sample, Turn, lay
from farkv.evals.tasks import TASKS

# Length of a continuation, and minimum length of a text, in tokens.
CONTINUATION = 64
LEAST_TOKENS = 256
PPL = "ppl"


class Maker:
    """Makes samples for one model's tokenizer, with one kind of filler.

    Args:
        tokenizer: the model's.
        filler: a name in `farkv.evals.fillers`.
        in_code: the tasks in code, as the demo model learned them; else those in plain words.
    """

    def __init__(self, tokenizer: Any, filler: str = "code", *, in_code: bool = True):
        self.tokenizer, self.filler, self.in_code = tokenizer, filler, in_code
        self.tasks = CODE_TASKS if in_code else TASKS
        # An unknown kind is refused before anything is made.
        self.draw(0, 0)

    def draw(self, n_tokens: int, seed: int) -> list[str]:
        """Return lines of filler, of at most so many tokens together."""
        return draw_lines(self.filler, n_tokens, seed, self.count)

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
        if task not in self.tasks:
            raise ConfigError(f"task: expected one of {', '.join([*self.tasks, PPL])}, got {task!r}")
        mixed = mix_seed(task, length, seed)
        made, room = self.fit(self.tasks[task], length, mixed, seed)
        lines = self.fill(made, room, mixed)
        laid, own = lay(made, lines, random.Random(mixed))
        text, depths = "".join(laid), find_depths(laid, own, made.turns)
        return Sample(task, length, seed, text, tuple(made.turns), depths, n_written=made.n_written)

    def fill(self, made: Made, room: int, seed: int) -> list[str]:
        """Return lines of `room` tokens at most: the task's own haystack over and over, or drawn ones."""
        if room <= 0:
            return []
        if made.haystack is None:
            return self.draw(room, seed)
        lines: list[str] = []
        costs = [self.count(line) for line in made.haystack]
        for line, cost in cycle(zip(made.haystack, costs, strict=True)):
            room -= cost
            if room < 0:
                return lines
            lines.append(line)
        return lines

    def fit(self, task: Callable[[Draw], Made], length: int, seed: int, sample: int) -> tuple[Made, int]:
        """Draw a task's lines, fewer and fewer until they fit; return them and the tokens left for filler."""
        size, name = length, None if self.in_code else join_hyphen
        while size >= LEAST_TOKENS // 4:
            made = task(Draw(seed, size, name=name, sample=sample))
            own = self.count("".join(made.lines)) + sum(self.count(t.completion + t.answer) + 2 for t in made.turns)
            own += made.n_written
            if own <= length - 8:
                return made, length - 8 - own
            size = int(size * min(0.95, (length - 8) / own))
        raise ConfigError(f"length: the task does not fit in {length} tokens; use more: --lengths 2048")

    def continue_text(self, length: int, seed: int) -> Sample:
        """Make a `ppl` sample: `length` tokens of text and the continuation."""
        wanted = length + CONTINUATION
        mixed = mix_seed(PPL, length, seed)
        ends: list[tuple[int, int]] = []
        room, text = wanted + 200, ""
        # Lines together may have fewer tokens than alone.
        while len(ends) < wanted:
            text = "".join(self.draw(room, mixed))
            ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            room += room // 10
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
        wanted = turn.expected[0] if turn.expected else None
        at = next((starts[i] for i in own if wanted is not None and wanted in lines[i]), None)
        depths.append(-1.0 if at is None else at / max(1, starts[-1]))
    return tuple(depths)
