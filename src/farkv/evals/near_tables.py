"""Tables of how near methods predict to the full cache: for the terminal, for Markdown, as JSON.

In: lines of `farkv.evals.closeness`. Out: text. The first column is what was read and scored per step, index included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from farkv.evals.closeness import Near
from farkv.evals.show import NONE, fraction_text, number, percent, write_rows

# A difference of fractions that is no rounding error.
TINY = 1e-6
MARKS = {"best": " *", "same": " ≈"}
EXPLAINED = (
    "n: samples, of the tasks that were run at that fraction. KL: nats per token to the full cache, at every token of "
    "the right answers, which are fed; in brackets its 95 % interval. top-1: the same token is the likeliest. score: "
    "of the method's own answers, on tasks that the full cache does not fail. *: nearest of its fraction, except what "
    "reads every key; ≈: not told apart from it (paired)."
)


def sum_bytes(line: Near) -> float:
    """Return the share of the cache's bytes that a step reads: records, and the index, or keys, that are scored."""
    return line.read_fraction + line.index_fraction


def show_bytes(line: Near) -> str:
    """Return what is read per step, index included, and in a hybrid model what of the managed layers is."""
    managed = line.managed_read_fraction
    differs = math.isfinite(managed) and abs(managed - line.read_fraction) > TINY
    return percent(sum_bytes(line)) + (f" (managed: {percent(managed)})" if differs else "")


def show_kl(line: Near) -> str:
    """Return a line's KL with its interval and mark: 0.021 [0.018..0.025] *."""
    if line.setting.is_full:
        return NONE
    return f"{number(line.kl.mean)} [{number(line.kl.low)}..{number(line.kl.high)}]{MARKS.get(line.mark, '')}"


def show_score(line: Near) -> str:
    """Return a line's score, a dash where the full cache fails every task."""
    return NONE if line.score is None else percent(line.score)


def to_json(lines: Sequence[Near]) -> list[dict[str, Any]]:
    """Return plain JSON types."""
    found: list[dict[str, Any]] = []
    for line in lines:
        rest = {name: value for name, value in line._asdict().items() if name != "setting"}
        found.append({**line.setting._asdict(), **rest, "kl": line.kl._asdict()})
    return found


def write_near(by_length: Mapping[str, Sequence[Near]]) -> str:
    """Return a Markdown table: a row per method and fraction, and per length samples, KL, top-1 and score."""
    rows = [["method", "fraction", "read + index"]]
    for name in by_length:
        rows[0] += ["n", f"KL, {name}", "top-1", "score"]
    keys = list(dict.fromkeys(line.setting for lines in by_length.values() for line in lines))
    for setting in sorted(keys, key=lambda s: (not s.is_full, s.fraction, s.method)):
        found = [next((x for x in lines if x.setting == setting), None) for lines in by_length.values()]
        first = next(line for line in found if line is not None)
        row = [setting.method, fraction_text(setting.fraction), show_bytes(first)]
        for line in found:
            row += [NONE] * 4 if line is None else [str(line.n), show_kl(line), percent(line.top1), show_score(line)]
        rows.append(row)
    return write_rows(rows, right=slice(1, None)).rstrip()


def count_samples(lines: Sequence[Near]) -> str:
    """Return the samples of some lines: `24`, or `16..112` where fractions have different ones."""
    counts = sorted({line.n for line in lines if not line.setting.is_full} or {line.n for line in lines} or {0})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"


def draw_near(lines: Sequence[Near]) -> RenderableType:
    """Return a table for an 80-column terminal."""
    drawn = RichTable(
        title="to the full cache", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    drawn.add_column("method", overflow="fold")
    for name in ("cap", "KL", "95 %", "top-1", "score", "read + index"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for line in sorted(lines, key=lambda x: (not x.setting.is_full, x.setting.fraction, x.kl.mean)):
        style = {"best": "bold"}.get(line.mark, "dim" if line.bound else "")
        kl = NONE if line.setting.is_full else number(line.kl.mean) + MARKS.get(line.mark, "  ")
        span = NONE if line.setting.is_full else f"{number(line.kl.low)}..{number(line.kl.high)}"
        texts = [fraction_text(line.setting.fraction), kl, span, percent(line.top1), show_score(line)]
        drawn.add_row(line.setting.method, *texts, percent(sum_bytes(line)), style=style)
    notes = [
        f"KL in nats per token, n = {count_samples(lines)} samples; score: on tasks that the full cache does not fail",
        "*: nearest, except what reads every key; ≈: not told apart from it",
    ]
    return Group(drawn, *(Text(f"- {note}", style="dim") for note in notes))
