"""Read a set's files as records; each knows its path and line, for error messages.

In: a path, or a file's name on the hub. Out: records whose fields are checked on access.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from farkv.config import check_text
from farkv.errors import InputError
from farkv.files import open_file, read_file
from farkv.quote import quote

HUB = "hub"


class Record(NamedTuple):
    """One JSON object and its position; in a JSON list, `line` counts entries."""

    path: Path
    line: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Return `path:line`."""
        return f"{quote(self.path)}:{self.line}"

    def refuse(self, expected: str) -> InputError:
        """Return an error that names what was expected and which fields there are."""
        got = ", ".join(f"{name} ({type(value).__name__})" for name, value in self.fields.items())
        return InputError(f"{self.place}: expected {expected}; got {got or 'no fields'}")

    def text(self, name: str) -> str:
        """Return a field that must be a string."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.refuse(f"the field {name} to be a string")
        check_text(f"{self.place}: {name}", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that must be a non-empty list of strings."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise self.refuse(f"the field {name} to be a list of strings, at least one")
        check_text(f"{self.place}: {name}", *value)
        return tuple(value)


def find_files(path: str, *suffixes: str) -> list[Path]:
    """Return the file, or all files below the folder with one of the suffixes, sorted by path."""
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in suffixes) if root.is_dir() else []
    if not found:
        kinds = " or ".join(suffixes)
        raise InputError(f"{quote(root)}: expected a file or a folder with {kinds} files; there is none")
    return found


def read_records(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of a JSON lines file."""
    if path.suffix == ".json":
        entries = parse(path, 1, read_text(path))
        if not isinstance(entries, list):
            raise InputError(f"{quote(path)}: expected a JSON list of objects; got {type(entries).__name__}")
        yield from (check(path, i, entry) for i, entry in enumerate(entries, 1))
    elif path.suffix == ".jsonl":
        with opening(path), open(open_file(path), "rb") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    yield check(path, i, parse(path, i, decode(path, i, line).rstrip()))
    else:
        raise InputError(
            f"{quote(path)}: expected .jsonl or .json; got {path.suffix or 'no suffix'}. Convert parquet to JSON "
            "lines: pandas.read_parquet(PATH).to_json(NAME, orient='records', lines=True)"
        )


def read_text(path: Path) -> str:
    """Return a file's text, with its line endings unchanged."""
    with opening(path):
        data = read_file(path)
    return decode(path, 1, data)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Put what the system says while a file is read into our words."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{quote(path)}: cannot be read ({error.strerror}); expected a data set's file") from error


def decode(path: Path, line: int, data: bytes) -> str:
    """Decode bytes that must be UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise InputError(f"{quote(path)}:{line}: expected UTF-8; got the byte 0x{data[error.start]:02x}") from error


def parse(path: Path, line: int, text: str) -> Any:
    """Parse JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{quote(path)}:{line + error.lineno - 1}: expected JSON; got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, thousands of brackets.
        raise InputError(f"{quote(path)}:{line}: expected JSON of usual size; got {error}") from error


def check(path: Path, line: int, value: Any) -> Record:
    """Return a value that must be a JSON object as a record."""
    if not isinstance(value, dict):
        raise InputError(f"{quote(path)}:{line}: expected a JSON object; got {type(value).__name__}")
    return Record(path, line, value)


def fetch(repo: str, name: str, spec: str) -> Path:
    """Return the local copy of a data set's file on the hub, downloading it if needed.

    Raises:
        InputError: it is not in the local cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"{repo}/{name}: expected the file on the hub or in its local cache; found it in neither "
            f"({type(error).__name__}). Download it on a machine with a network, copy it here, and give {spec}:PATH"
        ) from error
