"""Prompts that `--save-prompts` wrote, read again: the same questions on any machine.

In: `prompts.jsonl`. Out: samples by task and length. Filler is drawn from what is installed, so that another machine
makes other prompts; a saved one is asked as it stands, and its digest is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farkv.errors import InputError
from farkv.evals.row import MAX_BYTES
from farkv.evals.sample import Sample, Turn
from farkv.files import read_file
from farkv.quote import quote
from farkv.untrusted import parse_json

# Fields of a sample, and what JSON has for them.
KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str, "length": int, "seed": int, "text": str, "turns": list, "depths": list, "continuation": str,
    "n_written": int,
}  # fmt: skip


class SavedPrompts:
    """The prompts of a file.

    Raises:
        InputError: the file cannot be read, or a line is not a prompt of farkv eval.
    """

    def __init__(self, path: Path):
        self.path = path
        self.samples: dict[tuple[str, int, int], Sample] = {}
        try:
            lines = read_file(path, MAX_BYTES).decode("utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(
                f"--prompts {quote(path)}: cannot be read ({error}); expected what --save-prompts wrote"
            ) from error
        for n, line in enumerate(lines, start=1):
            if line.strip():
                sample = self._parse(n, line)
                self.samples[sample.task, sample.length, sample.seed] = sample

    def _parse(self, n: int, line: str) -> Sample:
        """Return the sample of a line, whose digest is what was written with it."""
        try:
            sample, sha = parse_sample(parse_json(line, half_letters=True))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"--prompts {quote(self.path)}, line {n}: expected a prompt of farkv eval ({error!r:.200}); write the "
                "file anew with --save-prompts"
            ) from error
        if sample.prompt_sha != sha:
            raise InputError(
                f"--prompts {quote(self.path)}, line {n}: expected the prompt {sha}, got {sample.prompt_sha}: it was "
                "changed after it was written; write the file anew with --save-prompts"
            )
        return sample

    def find(self, task: str, length: int, seeds: Sequence[int]) -> list[Sample]:
        """Return a cell's samples, as many of these as there are.

        Raises:
            InputError: there is none.
        """
        found = [self.samples[task, length, seed] for seed in seeds if (task, length, seed) in self.samples]
        if not found:
            cells = sorted({f"{t}/{n}" for t, n, _ in self.samples})
            raise InputError(
                f"--prompts {quote(self.path)}: expected {task} at {length} tokens, got "
                f"{', '.join(cells) or 'nothing'}; name what is there in --tasks and --lengths"
            )
        return found


def parse_sample(record: Any) -> tuple[Sample, str]:
    """Return a saved prompt's sample and digest.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    for name, kind in KINDS.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"{name}: expected {kind}")
    given = {name: record[name] for name in KINDS if name not in ("turns", "depths")}
    turns = tuple(Turn(**{**turn, "expected": tuple(turn["expected"])}) for turn in record["turns"])
    for turn in turns:
        words = (*turn.expected, turn.completion, turn.instruction, turn.answer, turn.score, turn.prefix)
        if not all(isinstance(word, str) for word in words):
            raise ValueError("turns: expected strings")
    return Sample(**given, turns=turns, depths=tuple(float(x) for x in record["depths"])), str(record["prompt_sha"])
