"""One line of `results.jsonl`: one method's answer to one sample, and what it read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from farkv.config import is_number, show_value
from farkv.errors import InputError
from farkv.files import read_file, write_file
from farkv.quote import quote
from farkv.untrusted import parse_json

RESULTS, RUN, READS, PROMPTS = "results.jsonl", "run.json", "reads.jsonl", "prompts.jsonl"


# Of results, and of traces; a line of results takes a kilobyte.
MAX_BYTES = 2**30


class Key(NamedTuple):
    """Identifies a row."""

    task: str
    method: str
    fraction: float
    length: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One answer.

    proof: `sparse`: decode steps read fewer bytes than the full cache holds, counted and checked; `everything`: the
    full cache; `every key`: an upper bound that reads all keys to select; `unproven`: nothing was decoded.
    bytes_per_step: mean KV and index bytes read per decode step; full_bytes_per_step: the same of a full cache.
    agrees: the answer equals the full cache's.  kl, top1: nats per token, and the share of equal first choices, to the
    full cache, at every token of the right answer (or of a known continuation), which is fed.  nll: nats per token of a
    continuation.  managed_read_fraction: of the layers that a method manages, which is what it caps; in a hybrid model
    the others read all they hold.  gated: the full cache itself fails the task at this length: the score says nothing.
    """

    task: str
    method: str
    fraction: float
    length: int
    seed: int
    answer: str
    expected: list[str]
    score: float
    read_fraction: float
    index_fraction: float
    resident_fraction: float
    kept_fraction: float
    prompt_sha: str
    gated: bool
    tokens: int
    steps: int
    agrees: bool | None
    kl: float | None
    nll: float | None
    depth: float | None
    turns: list[dict[str, Any]] = field(default_factory=list)
    proof: str = "unproven"
    bytes_per_step: float = 0.0
    full_bytes_per_step: float = 0.0
    decode_s: float = 0.0
    tokens_per_s: float = 0.0
    query_aware: bool = False
    top1: float | None = None
    managed_read_fraction: float | None = None

    @property
    def key(self) -> Key:
        """The row's key."""
        return Key(self.task, self.method, self.fraction, self.length, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the JSON line.

        Raises:
            InputError: a number is not finite.
        """
        try:
            return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise InputError(
                f"{self.task}, sample {self.seed}, {self.method}: expected finite numbers, the model computed NaN or "
                "infinity; look for NaN in the weights, or load it in a dtype of more range: --dtype float32"
            ) from error


# What stands in a row's fields, by their annotation.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda x: isinstance(x, str),
    "int": lambda x: type(x) is int,
    "float": is_number,
    "float | None": lambda x: x is None or is_number(x),
    "bool": lambda x: isinstance(x, bool),
    "bool | None": lambda x: x is None or isinstance(x, bool),
    "list[str]": lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x),
    "list[dict[str, Any]]": lambda x: isinstance(x, list) and all(isinstance(turn, dict) for turn in x),
}


def parse_row(line: str) -> Row:
    """Return the row of a line.

    Raises:
        ValueError, TypeError: it is none.
    """
    row = Row(**parse_json(line, half_letters=True))
    for about in fields(row):
        value = getattr(row, about.name)
        if not _KINDS[str(about.type)](value):
            raise ValueError(f"{about.name}: expected {about.type}, got {show_value(value)}")
    return row


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a results file anew, whole or not at all."""
    text = "".join(row.to_json() + "\n" for row in rows)
    write_file(path, text.encode("utf-8", "backslashreplace"), "file", private=True)


def read_rows(path: Path, *, mend: bool = False) -> list[Row]:
    """Read a results file.

    Args:
        mend: remove a truncated last line from the file, as an interrupted run leaves it; else it is an error.

    Raises:
        InputError: a line is not a row.
    """
    rows: list[Row] = []
    try:
        # Lines of bytes: other characters that end lines of a text may stand in answers.
        lines = read_file(path, MAX_BYTES).splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise InputError(f"file {quote(path)}: cannot be read ({error}); expected the results of farkv eval") from error
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(parse_row(line.decode("utf-8")))
        except (ValueError, TypeError) as error:
            if mend and n == len(lines) and not line.endswith(b"\n"):
                write_file(path, b"".join(lines[:-1]), "file", private=True)
                break
            raise InputError(
                f"file {quote(path)}, line {n}: expected a row of farkv eval, got "
                f"{line[:60].decode(errors='replace')!r} ({error}); delete the line, or use another --out"
            ) from error
    return rows
