"""Tables as text: Markdown for the README and docs, a `rich` table for the terminal, and number formatting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from farkv.evals.cells import FULL, Setting, Study
from farkv.evals.stats import Interval
from farkv.evals.tables import Line, Table, make_table

NONE = "–"
COLUMNS = ("score", "to full", "agrees", "KL", "read", "index", "kept", "resident", "proof")
EXPLAINED = (
    "Means over cells (a task at a length) with equal weights; in brackets the 95 % interval of a paired bootstrap. "
    "**Bold**: best at this fraction, except the oracle; ≈: not significantly different from the best."
)


def percent(value: float, digits: int = 1) -> str:
    """Format a fraction as a percentage: 98.0 %."""
    return NONE if math.isnan(value) else f"{100 * value:.{digits}f} %"


def points(difference: float) -> str:
    """Format a difference of fractions in percentage points, with its sign: +1.2, −0.4, 0.0."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def fraction_text(fraction: float) -> str:
    """Format a method's fraction: 2 %, 12.5 %."""
    return f"{100 * fraction:.4g} %"


def number(value: float) -> str:
    """Format a small number with two significant digits, NaN as a dash: 0.0031, 0.25, 14."""
    if math.isnan(value):
        return NONE
    if value == 0 or abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


def length_text(length: int) -> str:
    """Format a token count: 2 K, 32 K, 1500."""
    return f"{length // 1024} K" if length >= 1024 and length % 1024 == 0 else f"{length}"


def span(found: Interval) -> str:
    """Format an interval of fractions, in percent: 97.1..98.4."""
    return f"{100 * found.low:.1f}..{100 * found.high:.1f}"


def point_span(found: Interval) -> str:
    """Format an interval of differences, in points: −0.9..+0.1."""
    return f"{points(found.low)}..{points(found.high)}"


def name_setting(setting: Setting) -> str:
    """Format a method and its fraction: `infinigen at 10 %`."""
    return setting.method if setting.is_full else f"{setting.method} at {fraction_text(setting.fraction)}"


def add_mark(text: str, line: Line | None) -> str:
    """Mark a score in Markdown: bold for the best, ≈ if not significantly different from the best."""
    return {"best": f"**{text}**", "same": f"{text} ≈"}.get(line.mark if line else "", text)


def to_markdown(table: Table) -> str:
    """Return a Markdown table with one line per method and fraction, and notes below it."""
    rows = [["method", "fraction", *COLUMNS]]
    for line in table.lines:
        score = add_mark(f"{percent(line.score.mean)} [{span(line.score)}]", line)
        delta = NONE if line.delta is None else f"{points(line.delta.delta.mean)} [{point_span(line.delta.delta)}]"
        m = line.measured
        bytes_ = [percent(m[f"{name}_fraction"]) for name in ("read", "index", "kept", "resident")]
        texts = [score, delta, percent(m["agrees"]), number(m["kl"]), *bytes_, line.proof]
        rows.append([line.setting.method, fraction_text(line.setting.fraction), *texts])
    tasks, lengths = list_places(table)
    notes = [EXPLAINED, f"Tasks: {tasks}. Lengths: {lengths}. Samples per method: {table.samples}.", *list_notes(table)]
    return write_rows(rows, right=slice(1, -1)) + "\n" + "\n\n".join(notes) + "\n"


def to_grid(study: Study, fraction: float) -> str:
    """Return one fraction's scores in Markdown: a line per method, columns for mean, each length and each task."""
    columns = list_columns(study)
    rows = [["method", *(table.title for table in columns)]]
    for method in study.methods:
        found = [table.find(method, None if method == FULL else fraction) for table in columns]
        if any(found):
            texts = [NONE if line is None else f"{100 * line.score.mean:.1f}" for line in found]
            rows.append([method, *map(add_mark, texts, found)])
    return write_rows(rows, right=slice(1, None))


def list_columns(study: Study) -> list[Table]:
    """Return the table over all cells, then one per length, then one per task."""
    lengths = sorted({cell.length for cell in study.cells})
    tasks = list(dict.fromkeys(cell.task for cell in study.cells))
    tables = [make_table(study, "mean")]
    if len(lengths) > 1:
        tables += [make_table(study, length_text(length), lengths=[length]) for length in lengths]
    return tables + [make_table(study, task, tasks=[task]) for task in tasks if len(tasks) > 1]


def list_places(table: Table) -> tuple[str, str]:
    """Return the tasks and the lengths of a table, as text."""
    tasks = dict.fromkeys(task for task, _ in table.cells)
    lengths = sorted({length for _, length in table.cells})
    return ", ".join(tasks), ", ".join(length_text(length) for length in lengths)


def list_notes(table: Table) -> list[str]:
    """Return notes on what is not compared, and why."""
    notes = []
    if table.gated:
        gated = [f"{g.task} at {length_text(g.length)} ({percent(g.full)}, n = {g.n})" for g in table.gated]
        notes.append(f"Not compared, the full cache itself is near the floor: {', '.join(gated)}.")
    if table.absent:
        absent = ", ".join(name_setting(s) for s in table.absent)
        notes.append(f"Not compared, too few samples answered: {absent}.")
    return notes


def write_rows(rows: Sequence[Sequence[str]], right: slice) -> str:
    """Return an aligned Markdown table; `right` selects the columns that are right-aligned."""
    rows = [[text.replace("|", r"\|").replace("\n", " ") for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    to_right = set(range(len(widths))[right])
    lines = [[t.rjust(w) if i in to_right else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    lines.insert(1, ["-" * (w - 1) + (":" if i in to_right else "-") for i, w in enumerate(widths)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_table(table: Table) -> RenderableType:
    """Return a table for an 80-column terminal."""
    drawn = RichTable(
        title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    drawn.add_column("method", overflow="fold")
    for name in ("fraction", "score", "95 %", "to full", "read + index"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for line in table.lines:
        style = {"best": "bold", "same": ""}.get(line.mark, "dim" if line.bound else "")
        delta = NONE if line.delta is None else points(line.delta.delta.mean)
        reads = percent(line.measured["read_fraction"] + line.measured["index_fraction"])
        score = percent(line.score.mean) + {"same": " ≈", "best": " *"}.get(line.mark, "  ")
        texts = [fraction_text(line.setting.fraction), score, span(line.score), delta, reads]
        drawn.add_row(line.setting.method, *texts, style=style)
    tasks, lengths = list_places(table)
    notes = [f"tasks: {tasks}; lengths: {lengths}; samples per method: {table.samples}", *list_notes(table)]
    notes.append("*: best at this fraction, except the oracle; ≈: not significantly different from the best")
    return Group(drawn, *(Text(f"- {note}", style="dim") for note in notes))
