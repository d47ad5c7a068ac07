"""Parsing and checking of option values: byte sizes, folders, and the names an option accepts.

In: text or numbers. Out: checked values. No tensors.
"""

from __future__ import annotations

import math
import operator
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from farkv.errors import ConfigError, InputError
from farkv.quote import quote, show_value

# EVICT: which records are evicted when the host pool is full (with a disk: which cached copies). QUANT: storage format
# of far records. KERNELS at decode steps: auto uses fast kernels where selected records are read, native also where all
# records are read, plain never.
EVICT = ("refuse", "fifo", "lru", "counter", "clock", "score")
QUANT = ("int8", "int4")
KERNELS = ("auto", "native", "plain")
# In what a model's linear maps are kept: as they were loaded, or packed.
WEIGHTS = ("none", "int8", "int4")

# The hidden state from which the next layer's query is estimated; `query`: it is not, the layer's own one chooses.
Source = Literal["attn", "residual", "post_attn", "query"]
SOURCES: tuple[Source, ...] = ("attn", "residual", "post_attn", "query")
# What a plan can set per layer: the records it keeps after the prompt, pins near, and may fetch per step.
Lever = Literal["keep", "near", "fetch"]
LEVERS: tuple[Lever, ...] = ("keep", "near", "fetch")
# How a budget is divided among layers.
Rule = Literal["xkv", "maxmin", "pyramid", "uniform"]
RULES: tuple[Rule, ...] = ("xkv", "maxmin", "pyramid", "uniform")

# Queries that an evictor looks at, at most.
MOST_WINDOW = 2**20

_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_i, f"{_letter}IB": 1024**_i, f"{_letter}B": 1000**_i}
# What a file, an address and torch's sizes can say.
MOST_BYTES = 2**63 - 1
# Tokens, layers, threads, rounds: there are never more.
MOST_COUNT = 2**31 - 1
# Sampling divides float32 logits by it: less is greedy to the last bit or overflows, more is a uniform draw.
TEMPERATURES = (1e-6, 1e6)
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str | None, option: str) -> int | None:
    """Turn `2GiB`, `512 MB`, `1.5G` or a number into bytes.

    `KiB`, `MiB`, `GiB`, `TiB` and the bare letters are powers of 1024, `KB` to `TB` powers of 1000.

    Args:
        size: the text or number; None means no limit.
        option: the option's name, for the error message.

    Raises:
        ConfigError: the text cannot be parsed, or the size is not positive.
    """
    if size is None:
        return None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ConfigError(
                f"{option}: cannot read {show_value(size)} as a byte size; expected a number with an optional unit, "
                "for example 512MiB, 2GiB or 1.5GB"
            )
        whole, _, part = match[1].partition(".")
        # A thousand digits are a size too, and too large.
        exact = Decimal(f"{whole[-40:] or 0}.{part[:40] or 0}") * unit
        size = MOST_BYTES + 1 if whole[:-40].strip("0") else int(exact)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigError(f"{option}: expected a positive number of bytes, got {show_value(size)}")
    if size > MOST_BYTES:
        raise ConfigError(
            f"{option}: expected at most {MOST_BYTES:,} bytes (8 EiB), got more; lower it, or leave it out"
        )
    return size


def may_be_folder(path: str) -> bool:
    """Say whether a folder of this name is seen; one that may not be looked at is not."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def parse_disk(disk: str | None, option: str) -> tuple[Path, int | None] | None:
    """Split `DIR:100GiB` into a folder and its byte limit; `DIR` alone means no limit.

    A folder's own name may have a colon: what follows the last one is a limit unless it has a `/`, and where a folder
    of the whole name exists it is asked which of the two is meant.

    Raises:
        ConfigError: the folder is missing, or the size cannot be parsed, or may be a part of the folder's name.
    """
    if disk is None:
        return None
    if not isinstance(disk, str | Path):
        raise ConfigError(f"{option}: expected a folder and a limit as text, got {show_value(disk)}")
    text = str(disk)
    folder, colon, size = text.rpartition(":")
    if not colon or "/" in size:
        folder, size = text, ""
    elif size and may_be_folder(text):
        raise ConfigError(
            f"{option}: {quote(text)} may be a folder, which exists, or {quote(folder)} with the limit {size}; "
            f"write {quote(text + '/')} for the folder without a limit, or put a limit behind it: {text}:100GiB"
        )
    if not folder or "\0" in folder:
        raise ConfigError(f"{option}: expected a folder and a limit, for example /data/kv:100GiB; got {disk!r}")
    return Path(folder), parse_bytes(size, option) if size else None


def check_storage(evict: str, quant: str | None, *, host: int | None) -> None:
    """Raise ConfigError unless the storage options are valid and consistent.

    Args:
        host: the host pool's limit; without one nothing is ever evicted.
    """
    check_name("evict", evict, EVICT)
    if quant is not None:
        check_name("quant", quant, QUANT)
    if evict != "refuse" and host is None:
        raise ConfigError(
            f"evict: {evict} applies only when the host pool has a limit, and none is set; set one: host='24GiB'"
        )


def format_bytes(n: float) -> str:
    """Format a byte count for display: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def check_fraction(fraction: float, option: str = "fraction") -> None:
    """Raise ConfigError unless 0 < fraction <= 1."""
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise ConfigError(f"{option}: expected a number in (0, 1], got {show_value(fraction)}")


def check_counts(least: int = 0, **counts: int) -> None:
    """Raise ConfigError unless all values are integers of at least `least`, and small enough to count tokens by."""
    for name, count in counts.items():
        if type(count) is not int or not least <= count <= MOST_COUNT:
            raise ConfigError(f"{name}: expected an integer from {least} to {MOST_COUNT}, got {show_value(count)}")


def check_seed(seed: int, option: str = "seed") -> None:
    """Raise ConfigError unless every generator takes a seed: of 64 bits, with a sign or without."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"{option}: expected an integer of 64 bits, from -2**63 to 2**64 - 1, got {show_value(seed)}")


def check_temperature(temperature: float, option: str) -> None:
    """Raise ConfigError unless logits can be divided by a temperature; 0 is greedy."""
    least, most = TEMPERATURES
    if not is_number(temperature) or not (temperature == 0 or least <= temperature <= most):
        raise ConfigError(
            f"{option}: expected 0 (greedy), or a number from {least:g} to {most:g}, got {show_value(temperature)}"
        )


def check_sampling(temperature: float, top_p: float | None, top_k: int | None, dashes: str = "") -> None:
    """Raise ConfigError unless an answer can be drawn so; what limits a draw needs one.

    Args:
        dashes: stand before the options' names on a command line.
    """
    check_temperature(temperature, f"{dashes}temperature")
    names = {"top_p": top_p, "top_k": top_k}
    for name, value in names.items():
        shown = dashes + (name.replace("_", "-") if dashes else name)
        if value is not None and temperature == 0:
            raise ConfigError(
                f"{shown}: limits what is drawn, and temperature 0 takes the likeliest token; give a "
                f"{dashes}temperature above 0, or leave {shown} out"
            )
        if name == "top_p" and value is not None:
            check_fraction(value, shown)
        elif value is not None:
            read_count(shown, value, 1)


def check_text(what: str, *texts: str) -> None:
    """Raise InputError where a text is none: a byte of an argument that is not UTF-8, or half a letter of JSON."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what}: expected text, got {text[error.start]!r} at character {error.start}, which no UTF-8 has; "
                "correct it"
            ) from error


def check_flag(**flags: bool) -> None:
    """Raise ConfigError unless all values are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"{name}: expected True or False, got {show_value(flag)}")


def check_window(window: int, pool: int) -> None:
    """Raise ConfigError unless a window has 1 query or more, and an average over neighbours a middle."""
    check_counts(1, window=window, pool=pool)
    if max(window, pool) > MOST_WINDOW or pool % 2 == 0:
        raise ConfigError(f"window and pool: expected at most {MOST_WINDOW}, pool odd; got {window} and {pool}")


def read_count(option: str, value: Any, least: int = 0) -> int:
    """Return a whole number of any integer type, numpy's too.

    Raises:
        ConfigError: it is none, or out of range.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not least <= count <= MOST_COUNT:
        raise ConfigError(f"{option}: expected an integer of at least {least}, got {show_value(value)}")
    return count


def is_number(value: object) -> bool:
    """Say whether a value is a finite number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MOST_BYTES


def check_name(option: str, got: object, names: tuple[str, ...]) -> None:
    """Raise ConfigError unless an option's value is one of the accepted names."""
    if not isinstance(got, str) or got not in names:
        raise ConfigError(f"{option}: expected {', '.join(names[:-1])} or {names[-1]}, got {show_value(got)}")
