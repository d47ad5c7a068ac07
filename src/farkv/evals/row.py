"""One line of `results.jsonl`: one method's answer to one sample, and what it read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from farkv.errors import InputError
from farkv.files import read_file, write_file
from farkv.quote import quote

RESULTS, RUN, READS, PROMPTS = "results.jsonl", "run.json", "reads.jsonl", "prompts.jsonl"


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
    agrees: the answer equals the full cache's.  nll, kl: nats per token of a continuation.
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

    @property
    def key(self) -> Key:
        """The row's key."""
        return Key(self.task, self.method, self.fraction, self.length, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the JSON line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def read_rows(path: Path, *, mend: bool = False) -> list[Row]:
    """Read a results file.

    Args:
        mend: remove a truncated last line from the file, as an interrupted run leaves it; else it is an error.

    Raises:
        InputError: a line is not a row.
    """
    rows: list[Row] = []
    try:
        # Not the text's lines: an answer may hold other separators, which JSON does not escape.
        lines = read_file(path).splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"file {quote(path)}: cannot be read ({error}); expected the results of farkv eval") from error
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(Row(**json.loads(line.decode("utf-8"))))
        except (ValueError, TypeError, RecursionError) as error:
            if mend and n == len(lines) and not line.endswith(b"\n"):
                write_file(path, b"".join(lines[:-1]), "file", private=True)
                break
            raise InputError(
                f"file {quote(path)}, line {n}: expected a row of farkv eval, got "
                f"{line[:60].decode(errors='replace')!r} ({error}); delete the line, or use another --out"
            ) from error
    return rows
