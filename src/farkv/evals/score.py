"""How right an answer is, 0 to 1; pure text, so that any program's answers can be scored alike.

RULER's rules where RULER has the task: the share of the expected strings that the answer contains, or whether it
contains one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any


def score_all(answer: str, expected: tuple[str, ...]) -> float:
    """Return the share of the expected strings that the answer contains, in any order."""
    told = answer.lower()
    return sum(e.lower() in told for e in expected) / len(expected)


def score_any(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 where the answer contains one of the expected strings."""
    told = answer.lower()
    return float(any(e.lower() in told for e in expected))


def score_prefix(answer: str, expected: tuple[str, ...]) -> float:
    """Return the share of the expected words that the answer says in order before its first mistake."""
    right = 0
    for said, wanted in zip(answer.split(), expected, strict=False):
        if said.strip(",;") != wanted:
            break
        right += 1
    return right / len(expected)


def score_letter(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 where the answer names the expected choice: "B", "(B)", "B. oak", "The answer is B"."""
    found = re.match(r"\W*([A-H])\b", answer) or re.search(r"\(([A-H])\)|[Aa]nswer(?: is)?:? *([A-H])\b", answer)
    return float(found is not None and expected[0] in found.groups())


def score_number(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 where the answer's first number is the expected one."""
    found = re.search(r"-?\d+(?:\.\d+)?", answer)
    return float(found is not None and float(found[0]) == float(expected[0]))


def score_json(answer: str, expected: tuple[str, ...]) -> float:
    """Return the F1 of fields: a field is right where the object of that name holds that value.

    The object's first key names it. Objects are read one by one, so that one damaged object costs its own fields.
    """
    wanted = collect_fields(json.loads(expected[0]))
    said = collect_fields(list(read_objects(answer)))
    if not wanted or not said:
        return float(wanted == said)
    return 2 * len(wanted & said) / (len(wanted) + len(said))


def read_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in a text, whatever stands around it."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            end = at + 1
        else:
            yield found
        at = text.find("{", end)


def collect_fields(objects: list[Any]) -> set[tuple[str, str, str]]:
    """Return (name of the object, key, value) of every field."""
    fields: set[tuple[str, str, str]] = set()
    for item in objects:
        if isinstance(item, dict) and item:
            name = json.dumps(next(iter(item.values())))
            fields |= {(name, key, json.dumps(value)) for key, value in item.items()}
    return fields


SCORES: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "all": score_all,
    "any": score_any,
    "prefix": score_prefix,
    "json": score_json,
    "letter": score_letter,
    "number": score_number,
}
