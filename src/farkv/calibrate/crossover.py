"""The crossover: the context length from which selecting records is faster than reading all, by the shape of records.

In: the result of `farkv bench --calibrate`. Out: a small JSON file in the user's cache folder, with one entry per
processor, kernel and shape; where there is none, an estimate from the shape alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from platformdirs import user_cache_path

from farkv.calibrate.processor import read_cpu_model
from farkv.config import MOST_COUNT
from farkv.errors import ConfigError
from farkv.files import read_file, replace_file, write_all
from farkv.names import make_folder
from farkv.quote import quote
from farkv.untrusted import parse_json

FORMAT = "farkv-calibration-1"
MAX_BYTES = 2**20
# What a step takes, by times measured on two processors (docs/decisions/0025): nanoseconds per byte of a record that is
# read in order, and among others; per query head and number of a key; per query head and record whose index is scored;
# per query head, whatever the context.
READ_NS, GATHER_NS, PRODUCT_NS, SCORE_NS, FIXED_NS = 1 / 16, 1 / 5, 0.08, 5.0, 15_000.0
# The default cap, which choosing reads.
CHOSEN_SHARE = 0.1
# An estimate is rounded up to the next of these, and is one of LEAST .. MOST.
STEP_TOKENS = LEAST_TOKENS = 1024
MOST_TOKENS = 32 * 1024

How = Literal["measured", "assumed"]


class RecordShape(NamedTuple):
    """What of a model decides how long reading and choosing take: KV heads, dimension, query heads of each."""

    kv_heads: int
    head_dim: int
    groups: int
    # As torch names it, for example bfloat16.
    dtype: str

    @property
    def itemsize(self) -> int:
        """Return the bytes of one number."""
        return 4 if self.dtype == "float32" else 2

    def __str__(self) -> str:
        return f"{self.kv_heads} x {self.head_dim}, groups of {self.groups}, {self.dtype}"


class Crossover(NamedTuple):
    """Up to how many tokens everything is read, and whether that was measured here."""

    tokens: int
    how: How


def choose_crossover(kernel: str, shape: RecordShape) -> Crossover:
    """Return what was measured of a shape on this processor, or else the estimate.

    Raises:
        ConfigError: the file is damaged.
    """
    measured = load_crossover(kernel, shape)
    return Crossover(estimate_crossover(shape), "assumed") if measured is None else Crossover(measured, "measured")


def estimate_crossover(shape: RecordShape) -> int:
    """Return where choosing begins to be faster by arithmetic alone, which runs nothing and so never varies.

    Both ways' times are straight lines in the context. Reading all: bytes, and products of every query head. Choosing:
    a scan of the index by every query head, the bytes of the records chosen, and something for every query head once.
    """
    record_bytes = 2 * shape.head_dim * shape.itemsize
    dense = record_bytes * READ_NS + shape.groups * shape.head_dim * PRODUCT_NS
    chosen = shape.groups * SCORE_NS + CHOSEN_SHARE * record_bytes * GATHER_NS
    if dense <= chosen:
        return MOST_TOKENS
    tokens = shape.groups * FIXED_NS / (dense - chosen)
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, -(-tokens // STEP_TOKENS) * STEP_TOKENS)))


def find_calibration_path() -> Path:
    """Return the file's path: in FARKV_CACHE_DIR, or else in the user's cache folder."""
    folder = os.environ.get("FARKV_CACHE_DIR")
    return (Path(folder) if folder else user_cache_path("farkv")) / "calibration.json"


def load_crossover(kernel: str, shape: RecordShape) -> int | None:
    """Return the context from which selecting records is faster on this processor; None if not measured.

    Args:
        kernel: name of the kernel in use.

    Raises:
        ConfigError: the file is damaged.
    """
    entry = read_entries().get(make_key(kernel, shape))
    return None if entry is None else int(entry["tokens"])


def save_crossover(kernel: str, shape: RecordShape, tokens: int, details: dict[str, Any]) -> Path:
    """Add or replace the entry of this processor and shape; the file is replaced atomically.

    Args:
        details: further measurements, plain JSON types.

    Raises:
        ConfigError: the file cannot be written, or the existing one is damaged.
    """
    path = find_calibration_path()
    entries = read_entries() | {make_key(kernel, shape): {"tokens": tokens, **details}}
    try:
        data = json.dumps({"format": FORMAT, "entries": entries}, indent=1, allow_nan=False).encode()
    except ValueError as error:
        raise ConfigError(
            f"calibration file {quote(path)}: cannot be written ({error}); measure again: farkv bench --calibrate"
        ) from error
    try:
        make_folder(path.parent)
        with replace_file(path, len(data)) as fd:
            write_all(fd, memoryview(data))
    except OSError as error:
        raise ConfigError(
            f"calibration file {quote(path)}: cannot be written ({error.strerror}); "
            "set FARKV_CACHE_DIR to a writable folder"
        ) from error
    return path


def make_key(kernel: str, shape: RecordShape) -> str:
    """Return the key of the entry of this processor, kernel and shape."""
    return f"{read_cpu_model()} | {kernel} | {shape}"


def read_entries() -> dict[str, dict[str, Any]]:
    """Return all entries; empty if there is no file.

    Raises:
        ConfigError: the file is damaged.
    """
    path = find_calibration_path()
    try:
        row = parse_json(read_file(path, MAX_BYTES))
        entries = row["entries"]
        if row["format"] != FORMAT or not all(is_count(entry["tokens"]) for entry in entries.values()):
            raise ValueError(f"expected format {FORMAT}, and of every entry its tokens")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"calibration file {quote(path)}: cannot be read ({error!r:.300}); delete it and measure again: "
            "farkv bench --calibrate"
        ) from error
    return entries


def is_count(value: object) -> bool:
    """Return whether a value from JSON is a token count."""
    return type(value) is int and 0 <= value <= MOST_COUNT
