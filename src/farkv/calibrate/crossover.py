"""The crossover: the context length from which selecting records is faster than reading all, measured once per machine.

In: the result of `farkv bench --calibrate`. Out: a small JSON file in the user's cache folder, with one entry per
processor and kernel.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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


def find_calibration_path() -> Path:
    """Return the file's path: in FARKV_CACHE_DIR, or else in the user's cache folder."""
    folder = os.environ.get("FARKV_CACHE_DIR")
    return (Path(folder) if folder else user_cache_path("farkv")) / "calibration.json"


def load_crossover(kernel: str) -> int | None:
    """Return the context from which selecting records is faster on this processor; None if not measured.

    Args:
        kernel: name of the kernel in use.

    Raises:
        ConfigError: the file is damaged.
    """
    entry = read_entries().get(make_key(kernel))
    return None if entry is None else int(entry["tokens"])


def save_crossover(kernel: str, tokens: int, details: dict[str, Any]) -> Path:
    """Add or replace this processor's entry; the file is replaced atomically.

    Args:
        details: further measurements, plain JSON types.

    Raises:
        ConfigError: the file cannot be written, or the existing one is damaged.
    """
    path = find_calibration_path()
    entries = read_entries() | {make_key(kernel): {"tokens": tokens, **details}}
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


def make_key(kernel: str) -> str:
    """Return the key of this processor's entry."""
    return f"{read_cpu_model()} | {kernel}"


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
