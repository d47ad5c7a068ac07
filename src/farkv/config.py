"""What options may say: byte sizes, folders, names of storage formats, eviction, kernels, and of methods' choices.

In: text or numbers. Out: checked values. Knows no tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from farkv.errors import ConfigError

# What goes when the host pool is full (over a disk: which copy), how far records are stored, and which kernels run at
# decode steps: the fast ones where a choice of records is read; also where all are; nowhere.
EVICT = ("refuse", "fifo", "lru", "counter", "clock", "score")
QUANT = ("int8", "int4")
KERNELS = ("auto", "native", "plain")

# The hidden state that the next layer's query is estimated from.
Source = Literal["attn", "residual", "post_attn"]
SOURCES: tuple[Source, ...] = ("attn", "residual", "post_attn")
# What a plan can drive: what a layer keeps after the prompt, pins near, and may fetch per step.
Lever = Literal["keep", "near", "fetch"]
LEVERS: tuple[Lever, ...] = ("keep", "near", "fetch")
# How layers share a budget.
Rule = Literal["xkv", "maxmin", "pyramid", "uniform"]
RULES: tuple[Rule, ...] = ("xkv", "maxmin", "pyramid", "uniform")

_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_i, f"{_letter}IB": 1024**_i, f"{_letter}B": 1000**_i}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str | None, option: str) -> int | None:
    """Turn `2GiB`, `512 MB`, `1.5G` or a number into bytes.

    `KiB`, `MiB`, `GiB`, `TiB` and the bare letters are powers of 1024, `KB` to `TB` powers of 1000.

    Args:
        size: the text or number; None means no limit.
        option: the option's name, for the error.

    Raises:
        ConfigError: the text does not parse, or the size is not positive.
    """
    if size is None:
        return None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ConfigError(
                f"{option}: cannot read {size!r} as a byte size; expected a number with an optional unit, "
                "for example 512MiB, 2GiB or 1.5GB"
            )
        size = int(float(match[1]) * unit)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigError(f"{option}: expected a positive number of bytes, got {size!r}")
    return size


def parse_disk(disk: str | None, option: str) -> tuple[Path, int | None] | None:
    """Turn `DIR:100GiB` into a folder and its byte limit; `DIR` alone has none.

    Raises:
        ConfigError: there is no folder, or the size does not parse.
    """
    if disk is None:
        return None
    folder, size = str(disk).rsplit(":", 1) if ":" in str(disk) else (str(disk), "")
    if not folder:
        raise ConfigError(f"{option}: expected a folder and a limit, for example /data/kv:100GiB; got {disk!r}")
    return Path(folder), parse_bytes(size, option) if size else None


def check_storage(evict: str, quant: str | None, *, host: int | None) -> None:
    """Raise ConfigError unless these say how records are kept.

    Args:
        host: the pool's limit, without which nothing is ever evicted.
    """
    check_name("evict", evict, EVICT)
    if quant is not None:
        check_name("quant", quant, QUANT)
    if evict != "refuse" and host is None:
        raise ConfigError(f"evict: {evict} says what goes when the host pool is full; give its limit: host='24GiB'")


def format_bytes(n: float) -> str:
    """Write a byte count for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def check_fraction(fraction: float) -> None:
    """Raise ConfigError unless 0 < fraction <= 1."""
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConfigError(f"fraction: expected a number in (0, 1], got {fraction!r}")


def check_counts(**counts: int) -> None:
    """Raise ConfigError unless these are whole numbers of at least 0."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"{name}: expected a whole number of at least 0, got {count!r}")


def check_name(option: str, got: str, names: tuple[str, ...]) -> None:
    """Raise ConfigError unless an option's value is one of its names."""
    if got not in names:
        raise ConfigError(f"{option}: expected {', '.join(names[:-1])} or {names[-1]}, got {got!r}")
