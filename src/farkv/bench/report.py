"""Results of a measurement: rows for `--json`, and tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farkv.bench.shapes import format_tokens
from farkv.bench.timing import Spread

OURS = "infinigen"


@dataclass(frozen=True)
class Row:
    """One method at one context; fields of `--json`. None: not applicable to this method, or not measured."""

    method: str
    context: int
    batch: int
    ms_per_layer: float
    ms_low: float
    ms_high: float
    ms_least: float
    rounds: int
    read_fraction: float | None
    floor_percent: float | None = None
    floor_ms: float | None = None
    # Values that only some measurements have: index fraction, layers, tokens per second, ...
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        row = asdict(self)
        return row | row.pop("more")


@dataclass(frozen=True)
class Report:
    """All rows of one run, the machine and the settings; `more` holds command-specific keys."""

    title: str
    rows: list[Row]
    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        rows = [row.to_dict() for row in self.rows]
        return {"rows": rows, "machine": self.machine, "settings": self.settings, "notes": self.notes, **self.more}


def make_row(method: str, context: int, batch: int, spread: Spread, **more: Any) -> Row:
    """Return a row from seconds per layer; keywords that are not fields of `Row` go into `more`."""
    known = {name: more.pop(name) for name in ("read_fraction", "floor_percent", "floor_ms") if name in more}
    known.setdefault("read_fraction", None)
    seconds = (spread.median_s, spread.low_s, spread.high_s, spread.least_s)
    mid, low, high, least = (float(f"{1e3 * s:.4g}") for s in seconds)
    return Row(method, context, batch, mid, low, high, least, spread.rounds, **known, more=more)


def format_ms(ms: float) -> str:
    """Format milliseconds with three significant digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def format_fraction(fraction: float | None) -> str:
    """Format a fraction as a percentage, None as a dash."""
    return "-" if fraction is None else "all" if fraction == 1 else f"{fraction:.1%}"


def compare(row: Row, rows: list[Row]) -> str:
    """Return the ratio of this method's time to farkv's at the same context, as text."""
    ours = [r for r in rows if r.method == OURS and (r.context, r.batch) == (row.context, row.batch)]
    return f"{row.ms_per_layer / ours[0].ms_per_layer:.1f}×" if ours and row is not ours[0] else ""


def draw_rows(report: Report) -> RenderableType:
    """Return a table of methods and contexts; it has a floor column only if a floor was measured."""
    has_floor = any(row.floor_percent is not None for row in report.rows)
    columns = ["context", "ms/layer", "25..75 %", "reads", *(["of floor"] if has_floor else []), f"× {OURS}"]
    table = make_table(report.title, columns)
    last = None
    for row in report.rows:
        if last is not None and row.context != last:
            table.add_row()
        cells = [row.method, format_tokens(row.context) if row.context != last else "", format_ms(row.ms_per_layer)]
        cells += [f"{format_ms(row.ms_low)}..{format_ms(row.ms_high)}", format_fraction(row.read_fraction)]
        if has_floor:
            cells.append("-" if row.floor_percent is None else f"{row.floor_percent:.0f} %")
        table.add_row(*cells, compare(row, report.rows))
        last = row.context
    return Group(table, *draw_notes(report))


def make_table(title: str, columns: Sequence[str], first: str = "method") -> Table:
    """Return an empty table: a name column, then right-aligned number columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def draw_notes(report: Report) -> list[RenderableType]:
    """Return a line about the machine, and the notes."""
    return [draw_machine(report.machine), *(Text(f"- {note}", style="dim") for note in report.notes)]


def draw_machine(machine: dict[str, Any]) -> RenderableType:
    """Describe the machine in one line."""
    words = [machine["cpu"], f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"]
    words.append(f"kernel {machine['kernel']}")
    if machine["read_gb_per_s"] is not None:
        words.append(f"reads {machine['read_gb_per_s']:.1f} GB/s")
        words.append(f"gathers {machine['gather_row_bytes']}-byte rows at {machine['gather_gb_per_s']:.1f} GB/s")
    return Text(", ".join(words))
