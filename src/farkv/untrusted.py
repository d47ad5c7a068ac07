"""JSON that nobody vouches for: it must say one thing to every parser.

In: bytes. Out: plain values; or a ValueError in words, to which the caller adds what file it was and the remedy.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# No number that farkv writes has more digits.
_MOST_DIGITS = 19


def parse_json(data: bytes | str, *, half_letters: bool = False) -> Any:
    """Return the value of a JSON text that every parser reads alike.

    Args:
        half_letters: a model's answer may end in half a letter (a lone surrogate), which stays as it is.

    Raises:
        ValueError: it is not UTF-8 or no JSON, nests too deeply, names a key twice, or has a number that is not
            finite, does not fit 64 bits or would round to infinity, or half a character.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_pair, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int
        )
        if "\\u" in text and not half_letters:
            # Half a letter (a lone surrogate) cannot be printed or written again.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("expected flat JSON, got one that nests too deeply") from error
    return value


def _pair(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"expected every key once, got {twice[:60]!r} twice")
    return made


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _parse_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {digits[:40]}")
    return number


def _parse_int(digits: str) -> int:
    if len(digits.removeprefix("-")) > _MOST_DIGITS:
        raise ValueError(f"expected whole numbers of at most {_MOST_DIGITS} digits, got one of {len(digits)}")
    return int(digits)
