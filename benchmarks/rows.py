"""Results, read back from their JSON lines, and Markdown tables made of them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Rows = list[Row]


def read_rows(path: Path | str, **wanted: Any) -> Rows:
    """Read a file, or one of `results` by its name; only rows with these columns if any are named."""
    lines = (RESULTS / path).read_text().splitlines()
    return [row for row in map(json.loads, lines) if all(row[key] == value for key, value in wanted.items())]


def group(rows: Iterable[Row], *columns: str) -> dict[Any, Rows]:
    """Return rows by a column's value, or by several columns' as a tuple, in the order in which they come first."""
    found: dict[Any, Rows] = defaultdict(list)
    for row in rows:
        key = tuple(row[name] for name in columns)
        found[key if len(columns) > 1 else key[0]].append(row)
    return dict(found)


def format_rows(head: Iterable[str], rows: Iterable[Iterable[object]], *notes: str) -> str:
    """Return a Markdown table, and notes behind it; a row of fewer cells ends with empty ones."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cells in map(list, rows):
        lines.append(f"| {' | '.join(map(str, cells))} |" + " |" * (len(head) - len(cells)))
    return "\n".join([*lines, "", *notes] if notes else lines)


def mean(values: Iterable[float]) -> float:
    """Return the mean, nan of nothing."""
    values = list(values)
    return statistics.fmean(values) if values else float("nan")


def percent(values: Iterable[float]) -> str:
    """Return a mean as text, a dash for nothing."""
    values = list(values)
    return f"{100 * mean(values):.1f} %" if values else "–"


def mib(n_bytes: float, digits: int = 0) -> str:
    """Return bytes in MiB."""
    return f"{n_bytes / 2**20:,.{digits}f}"
