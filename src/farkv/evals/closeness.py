"""How near methods predict to the full cache, in tables: KL and top-1 under teacher forcing, and what was read for it.

In: rows of a run. Out: a line per method and fraction, over the samples that all of them answered. No cell is gated:
KL needs no skill of the model. Cells (a task at a length) have equal weights; intervals are of a paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from farkv.evals.cells import BOUND_PROOF, FULL, LEAST_SAMPLES, Setting, as_float, average_known
from farkv.evals.row import Row
from farkv.evals.stats import Floats, Interval, column_means, draw_means, interval

# Averaged besides.
MEASURED = ("top1", "read_fraction", "index_fraction", "kept_fraction", "managed_read_fraction")


class Near(NamedTuple):
    """One method at one fraction.

    kl: nats per token to the full cache.  top1: share of equal first choices.  score: mean over the cells that the full
    cache itself does not fail; None if there is none.  managed_read_fraction: of the managed layers; NaN where not
    measured.  mark: `best` of its fraction but for what reads every key;
    `same`: the paired interval of the difference to it holds 0.  n: samples.
    """

    setting: Setting
    kl: Interval
    top1: float
    score: float | None
    read_fraction: float
    index_fraction: float
    kept_fraction: float
    managed_read_fraction: float
    n: int
    bound: bool
    mark: str = ""


class Group(NamedTuple):
    """A cell's settings, and per sample (rows) and setting (columns) KL, scores, and means of `MEASURED`."""

    settings: list[Setting]
    kl: Floats
    scores: Floats
    measured: Floats
    gated: bool


def measure_near(
    rows: Iterable[Row],
    *,
    methods: Collection[str] = (),
    tasks: Collection[str] = (),
    lengths: Collection[int] = (),
    fractions: Collection[float] = (),
) -> list[Near]:
    """Return a line per method and fraction; those named, or all.

    Only settings that were run on all cells are compared, over samples that all settings of a cell answered. Cells
    whose run is not finished are left out, where otherwise too many settings would be (`choose_cells`).
    """
    chosen = [
        row
        for row in {row.key: row for row in rows}.values()
        if row.kl is not None
        and (not tasks or row.task in tasks)
        and (not lengths or row.length in lengths)
        and (row.method == FULL or not methods or row.method in methods)
        and (row.method == FULL or not fractions or row.fraction in fractions)
    ]
    bounds = {Setting(r.method, r.fraction) for r in chosen if r.proof == BOUND_PROOF}
    groups = group_cells(chosen)
    groups, everywhere = choose_cells(groups)
    lines = [make_line(groups, s, is_bound=s in bounds) for s in everywhere]
    lines.sort(key=lambda x: (not x.setting.is_full, x.setting))
    return mark_nearest(groups, lines)


def measure_fractions(rows: Sequence[Row], lengths: Collection[int] = ()) -> list[Near]:
    """Return the lines of some lengths or all, fraction by fraction: each over all cells that were run at that one.

    Fractions of more tasks than others are not cut down to what they have in common; the full cache's line is of the
    most samples.
    """
    own = [row for row in rows if not lengths or row.length in lengths]
    fractions = sorted({row.fraction for row in own if row.method != FULL})
    # Where the full cache alone was run there is its line.
    found = [line for f in fractions or [1.0] for line in measure_near(own, fractions=[f])]
    full = max((line for line in found if line.setting.is_full), key=lambda line: line.n, default=None)
    return ([] if full is None else [full]) + [line for line in found if not line.setting.is_full]


def choose_cells(groups: list[Group]) -> tuple[list[Group], list[Setting]]:
    """Return those cells, the fullest first, that give the most cells times settings in common, and these settings."""
    ordered = sorted(groups, key=lambda group: -len(group.settings))
    best: tuple[list[Group], list[Setting]] = ([], [])
    for n in range(1, len(ordered) + 1):
        common = [s for s in ordered[0].settings if all(s in group.settings for group in ordered[:n])]
        if n * len(common) >= len(best[0]) * len(best[1]):
            best = ordered[:n], common
    return best


def group_cells(rows: list[Row]) -> list[Group]:
    """Return the cells, each over the samples that all its settings answered."""
    cells: dict[tuple[str, int], dict[Setting, dict[int, Row]]] = {}
    for row in rows:
        cells.setdefault((row.task, row.length), {}).setdefault(Setting(row.method, row.fraction), {})[row.seed] = row
    groups: list[Group] = []
    for cell in cells.values():
        most = max(map(len, cell.values()))
        kept = {s: found for s, found in cell.items() if len(found) >= LEAST_SAMPLES * most}
        seeds = sorted(set.intersection(*map(set, kept.values())))
        if not seeds:
            continue
        table = [[kept[s][i] for s in kept] for i in seeds]
        kl = np.array([[as_float(row.kl) for row in line] for line in table])
        scores = np.array([[row.score for row in line] for line in table])
        values = np.array([[[as_float(getattr(row, m)) for m in MEASURED] for row in line] for line in table])
        gated = any(row.gated for found in kept.values() for row in found.values())
        groups.append(Group(list(kept), kl, scores, average_known(values), gated))
    return groups


def average(groups: list[Group], setting: Setting, table: str) -> tuple[float, Floats]:
    """Return the mean of a setting's column of a table over cells, and its bootstrap means."""
    columns = [getattr(g, table)[:, [g.settings.index(setting)]] for g in groups]
    means = [float(column_means(column)[0]) for column in columns]
    drawn = [draw_means(column, [2, i])[:, 0] for i, column in enumerate(columns)]
    return float(np.mean(means)), np.mean(drawn, axis=0)


def make_line(groups: list[Group], setting: Setting, *, is_bound: bool) -> Near:
    """Return a setting's line."""
    n = sum(len(group.kl) for group in groups)
    mean, drawn = average(groups, setting, "kl")
    able = [group for group in groups if not group.gated]
    score = average(able, setting, "scores")[0] if able else None
    measured = np.mean([group.measured[group.settings.index(setting)] for group in groups], axis=0)
    named: dict[str, Any] = dict(zip(MEASURED, measured.tolist(), strict=True))
    return Near(setting, interval(mean, drawn, n), score=score, n=n, bound=is_bound, **named)


def mark_nearest(groups: list[Group], lines: list[Near]) -> list[Near]:
    """Mark, at every fraction, the line of the least KL and those not told apart from it."""
    marked: list[Near] = []
    for line in lines:
        rivals = [x for x in lines if x.setting.fraction == line.setting.fraction and can_win(x)]
        if not can_win(line):
            marked.append(line)
            continue
        best = min(rivals, key=lambda x: x.kl.mean)
        gap, drawn = (a - b for a, b in zip(*(average(groups, x.setting, "kl") for x in (line, best)), strict=True))
        low = interval(float(gap), drawn, line.n).low
        marked.append(line._replace(mark="best" if best is line else "same" if low <= 0 else ""))
    return marked


def can_win(line: Near) -> bool:
    """Return whether a line is neither the full cache nor a bound that reads every key."""
    return not line.setting.is_full and not line.bound
