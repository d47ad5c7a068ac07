"""Select a data set's samples by length, up to a limit, in an order given by a seed.

In: items, each a text and its turns. Out: samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from farkv.errors import InputError
from farkv.evals.sample import Sample, Turn

# Allowance for tokens at the boundary between text and question.
SPARE = 8


class Item(NamedTuple):
    """One record of a set; `number` is its index among its task's records."""

    task: str
    number: int
    text: str
    turns: tuple[Turn, ...]
    depths: tuple[float, ...] = ()
    meta: dict[str, str] | None = None


class Wanted(NamedTuple):
    """The requested samples of a set."""

    tokenizer: Any
    lengths: tuple[int, ...]
    limit: int | None
    seed: int

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ask(self, turns: tuple[Turn, ...]) -> int:
        """Return the tokens of the longest question with its answer."""
        return SPARE + max(self.count(t.completion + t.answer) for t in turns)

    def shuffle(self, items: Iterable[Item]) -> list[Item]:
        """Return a task's items in an order given by the seed."""
        ordered = list(items)
        random.Random(self.seed).shuffle(ordered)
        return ordered


def choose(
    items: Iterable[Item], wanted: Wanted, cut: Callable[[str, int, int], str] | None = None
) -> Iterator[Sample]:
    """Yield samples task by task, length by length.

    Args:
        items: of all tasks.
        wanted: tokenizer, lengths, limit, seed.
        cut: shortens a text, given the target length and the tokens of question and answer; None: texts that are too
            long are skipped.

    Raises:
        InputError: no sample of a task fits any of the lengths.
    """
    tasks: dict[str, list[Item]] = {}
    for item in items:
        tasks.setdefault(item.task, []).append(item)
    for task, group in tasks.items():
        sizes: dict[int, int] = {}
        chosen = [s for length in wanted.lengths for s in pick(wanted.shuffle(group), length, wanted, sizes, cut)]
        if not chosen:
            found = f"{len(group)} between {min(sizes.values())} and {max(sizes.values())} tokens"
            lengths = ", ".join(map(str, wanted.lengths))
            raise InputError(
                f"{task}: expected samples that fit in {lengths} tokens and are longer than half of that; got {found}. "
                f"Use other lengths: --lengths {max(sizes.values())}"
            )
        yield from chosen


def pick(
    group: list[Item],
    length: int,
    wanted: Wanted,
    sizes: dict[int, int],
    cut: Callable[[str, int, int], str] | None,
) -> list[Sample]:
    """Return a task's samples of one length; `sizes` caches token counts."""
    found: list[Sample] = []
    refused = 0
    for item in group:
        if wanted.limit is not None and len(found) >= wanted.limit:
            break
        asked = wanted.ask(item.turns)
        if item.number not in sizes:
            sizes[item.number] = wanted.count(item.text) + asked
        size, text = sizes[item.number], item.text
        if size > length and cut is not None:
            text = cut(text, length, asked)
            size = length if text else size
        if not length < 2 * size <= 2 * length:
            refused += 1
            continue
        meta = {**(item.meta or {}), "cut": "middle" if text is not item.text else "no"}
        found.append(Sample(item.task, length, item.number, text, item.turns, item.depths, meta=meta))
    for sample in found:
        sample.meta["refused_before"] = str(refused)
    return sorted(found, key=lambda s: s.seed)
