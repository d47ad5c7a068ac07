"""Files that nobody vouches for: read only where they are plain files of a bounded size, and JSON that says one thing.

In: a path, or bytes. Out: bytes or plain values; or an OSError or ValueError in words, to which the caller adds what
file it was and the remedy.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

# No number that farkv writes has more digits.
_MOST_DIGITS = 19


def read_file(path: str | Path, most_bytes: int) -> bytes:
    """Return what a plain file holds. Pipes and devices are refused without waiting for them.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is no plain file, too large, or changed while it was read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0, closefd=True) as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("expected a plain file, got a folder, pipe or device")
        if about.st_size > most_bytes:
            raise ValueError(f"expected at most {most_bytes:,} bytes, got {about.st_size:,}")
        parts, n_read = [], 0
        while n_read <= about.st_size and (part := file.read(about.st_size + 1 - n_read)):
            parts.append(part)
            n_read += len(part)
    if n_read != about.st_size:
        raise ValueError(f"expected {about.st_size:,} bytes, got {n_read:,}: it is being written")
    return b"".join(parts)


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text that every parser reads alike.

    Raises:
        ValueError: it is not UTF-8 or no JSON, nests too deeply, names a key twice, or has a number that is not
            finite, does not fit 64 bits or would round to infinity, or half a character.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_pair, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int
        )
        if "\\u" in text:
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
