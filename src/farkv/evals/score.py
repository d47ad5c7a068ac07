"""Scores of answers, 0 to 1; they use text only, so that any program's answers can be scored.

They follow RULER for RULER's tasks: the fraction of the expected strings that the answer contains, or whether it
contains one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any


def score_all(answer: str, expected: tuple[str, ...]) -> float:
    """Return the fraction of the expected strings that the answer contains, in any order."""
    lowered = answer.lower()
    return sum(e.lower() in lowered for e in expected) / len(expected)


def score_any(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 if the answer contains one of the expected strings."""
    lowered = answer.lower()
    return float(any(e.lower() in lowered for e in expected))


def score_prefix(answer: str, expected: tuple[str, ...]) -> float:
    """Return the fraction of the expected words that the answer gives in order before its first mistake."""
    correct = 0
    for word, wanted in zip(answer.split(), expected, strict=False):
        if word.strip(",;") != wanted:
            break
        correct += 1
    return correct / len(expected)


def score_letter(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 if the answer names the expected choice: "B", "(B)", "B. oak", "The answer is B"."""
    found = re.match(r"\W*([A-H])\b", answer) or re.search(r"\(([A-H])\)|[Aa]nswer(?: is)?:? *([A-H])\b", answer)
    return float(found is not None and expected[0] in found.groups())


def score_number(answer: str, expected: tuple[str, ...]) -> float:
    """Return 1 if the answer's first number is the expected one."""
    found = re.search(r"-?\d+(?:\.\d+)?", answer)
    return float(found is not None and float(found[0]) == float(expected[0]))


def score_json(answer: str, expected: tuple[str, ...]) -> float:
    """Return the F1 over fields: a field is correct if the object with the same name has that value.

    An object is named by its first value. Objects are parsed one by one, so that a malformed one only loses its own
    fields.
    """
    wanted = collect_fields(json.loads(expected[0]))
    found = collect_fields(list(read_objects(answer)))
    if not wanted or not found:
        return float(wanted == found)
    return 2 * len(wanted & found) / (len(wanted) + len(found))


def read_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in a text, ignoring the text around it."""
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
    """Return (object's name, key, value) of every field."""
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
