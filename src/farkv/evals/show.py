"""Tables as text: Markdown for the README and docs, a `rich` table for the terminal, numbers as people read them."""

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
    "Means over cells (a task at a length), each of the same weight; in brackets what 95 % of a paired bootstrap lies "
    "between. **Bold**: best at this fraction, the oracle aside; ≈: not different from the best."
)


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage: 98.0 %."""
    return NONE if math.isnan(share) else f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """Write a difference of shares in points, with its sign: +1.2, −0.4, 0.0."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def fraction_text(fraction: float) -> str:
    """Write a fraction as it is asked for: 2 %, 12.5 %."""
    return f"{100 * fraction:.4g} %"


def number(value: float) -> str:
    """Write a small number with two significant digits, a dash for none: 0.0031, 0.25, 14."""
    if math.isnan(value):
        return NONE
    if value == 0 or abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


def length_text(length: int) -> str:
    """Write tokens: 2 K, 32 K, 1500."""
    return f"{length // 1024} K" if length >= 1024 and length % 1024 == 0 else f"{length}"


def span(found: Interval) -> str:
    """Write an interval of shares: 97.1..98.4."""
    return f"{100 * found.low:.1f}..{100 * found.high:.1f}"


def point_span(found: Interval) -> str:
    """Write an interval of differences in points: −0.9..+0.1."""
    return f"{points(found.low)}..{points(found.high)}"


def name_setting(setting: Setting) -> str:
    """Write a method and its fraction: `infinigen at 10 %`."""
    return setting.method if setting.is_full else f"{setting.method} at {fraction_text(setting.fraction)}"


def add_mark(text: str, line: Line | None) -> str:
    """Write a score in Markdown: bold where it is the best, with ≈ where it is not different from the best."""
    return {"best": f"**{text}**", "same": f"{text} ≈"}.get(line.mark if line else "", text)


def to_markdown(table: Table) -> str:
    """Write a table with one line per method and fraction, what is gated below it."""
    rows = [["method", "fraction", *COLUMNS]]
    for line in table.lines:
        score = add_mark(f"{percent(line.score.mean)} [{span(line.score)}]", line)
        delta = NONE if line.delta is None else f"{points(line.delta.delta.mean)} [{point_span(line.delta.delta)}]"
        m = line.measured
        shares = [percent(m[f"{name}_fraction"]) for name in ("read", "index", "kept", "resident")]
        texts = [score, delta, percent(m["agrees"]), number(m["kl"]), *shares, line.proof]
        rows.append([line.setting.method, fraction_text(line.setting.fraction), *texts])
    tasks, lengths = list_places(table)
    notes = [EXPLAINED, f"Tasks: {tasks}. Lengths: {lengths}. Samples per method: {table.samples}.", *list_notes(table)]
    return write_rows(rows, right=slice(1, -1)) + "\n" + "\n\n".join(notes) + "\n"


def to_grid(study: Study, fraction: float) -> str:
    """Write one fraction's scores, methods down, and the average, every length and every task across."""
    columns = list_columns(study)
    rows = [["method", *(table.title for table in columns)]]
    for method in study.methods:
        found = [table.find(method, None if method == FULL else fraction) for table in columns]
        if any(found):
            texts = [NONE if line is None else f"{100 * line.score.mean:.1f}" for line in found]
            rows.append([method, *map(add_mark, texts, found)])
    return write_rows(rows, right=slice(1, None))


def list_columns(study: Study) -> list[Table]:
    """Return the table over all cells, then one per length and one per task."""
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
    """Return what is not compared, and why."""
    notes = []
    if table.gated:
        gated = [f"{g.task} at {length_text(g.length)} ({percent(g.full)}, n = {g.n})" for g in table.gated]
        notes.append(f"Not compared, the full cache itself is near the floor: {', '.join(gated)}.")
    if table.absent:
        absent = ", ".join(name_setting(s) for s in table.absent)
        notes.append(f"Not compared, too few of the samples are answered: {absent}.")
    return notes


def write_rows(rows: Sequence[Sequence[str]], right: slice) -> str:
    """Write Markdown with columns of equal width; `right` says which ones are aligned to the right."""
    rows = [[text.replace("|", r"\|").replace("\n", " ") for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    to_right = set(range(len(widths))[right])
    lines = [[t.rjust(w) if i in to_right else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    lines.insert(1, ["-" * (w - 1) + (":" if i in to_right else "-") for i, w in enumerate(widths)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_table(table: Table) -> RenderableType:
    """Return a table for a terminal of 80 columns."""
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
    notes.append("*: best at this fraction, the oracle aside; ≈: not different from the best")
    return Group(drawn, *(Text(f"- {note}", style="dim") for note in notes))
