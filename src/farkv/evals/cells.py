"""Rows sorted into cells: one task at one length, the samples that all methods answered, their resampled means.

In: rows of `results.jsonl`. Out: cells that can be compared, cells that are gated, and what was left out and why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from farkv.errors import InputError
from farkv.evals.row import Row
from farkv.evals.stats import DRAWS, Floats, column_means, draw_means

FULL, OURS = "full", "infinigen"
# Read all keys to choose: bounds, not rivals.
BOUND_PROOF = "every key"
# What is averaged beside the score; None and NaN count as not measured.
MEASURES = (
    "agrees",
    "kl",
    "nll",
    "read_fraction",
    "index_fraction",
    "resident_fraction",
    "kept_fraction",
    "tokens_per_s",
)
# A method that answered less of a cell's samples, or of the cells, than this is not compared there: otherwise one that
# was stopped early, or ran at one length only, would take the samples away from all others.
LEAST_SAMPLES, LEAST_CELLS = 0.8, 0.9


class Setting(NamedTuple):
    """What is compared: a method at a fraction."""

    method: str
    fraction: float

    @property
    def is_full(self) -> bool:
        """Return whether it is the full cache."""
        return self.method == FULL


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    settings: that answered it, the columns of all arrays.  seeds: samples that all of them answered, the rows.
    scores: `[n, m]`.  means: `[m]`.  drawn: `[draws, m]`, means of the same resamples for every column.
    measured: mean of each measure, `[m]`, NaN where it was not measured.  depths: `[n]`, NaN where there is none.
    """

    task: str
    length: int
    settings: dict[Setting, int]
    seeds: list[int]
    scores: Floats
    means: Floats
    drawn: Floats
    measured: dict[str, Floats]
    depths: Floats


class Gated(NamedTuple):
    """A cell that is kept out of comparisons: the full cache itself is near the floor there."""

    task: str
    length: int
    full: float
    n: int


@dataclass(frozen=True)
class Study:
    """All cells of one run.

    proofs: how often each proof stands in a setting's rows.  aware: settings whose choice sees the query.
    dropped: rows whose prompt is not the one that the full cache answered, or that have no score.
    """

    cells: list[Cell]
    gated: list[Gated]
    proofs: dict[Setting, Counter[str]]
    aware: set[Setting]
    dropped: int = 0

    @property
    def settings(self) -> list[Setting]:
        """Return all settings: the full cache first, then ours, then by name and fraction."""
        return sorted(self.proofs, key=lambda s: (not s.is_full, s.method != OURS, s.method, s.fraction))

    @property
    def fractions(self) -> list[float]:
        """Return the fractions of all methods but the full cache, ascending."""
        return sorted({s.fraction for s in self.proofs if not s.is_full})

    @property
    def methods(self) -> list[str]:
        """Return the methods' names in the order of `settings`."""
        return list(dict.fromkeys(s.method for s in self.settings))

    def is_bound(self, setting: Setting) -> bool:
        """Return whether a setting read all keys to choose: a ceiling, not a rival."""
        return set(self.proofs[setting]) == {BOUND_PROOF} or setting.method == "oracle"

    def is_rival(self, setting: Setting) -> bool:
        """Return whether a setting can be the best: neither the full cache nor a bound."""
        return not setting.is_full and not self.is_bound(setting)

    def find_cells(self, tasks: Sequence[str] = (), lengths: Sequence[int] = ()) -> list[Cell]:
        """Return the cells of these tasks and lengths; none named means all."""
        return [
            cell for cell in self.cells if (not tasks or cell.task in tasks) and (not lengths or cell.length in lengths)
        ]


def study_rows(rows: Iterable[Row], draws: int = DRAWS) -> Study:
    """Sort rows into cells and resample each.

    Args:
        rows: of one run; of rows with the same key the last one counts.
        draws: resamples per cell.

    Raises:
        InputError: there are no rows, or none of the full cache.

    Cost: draws times the samples of a method in random numbers, whatever the number of methods.
    """
    last = {row.key: row for row in rows}
    if not last:
        raise InputError("results: there are no rows; run farkv eval first, with the same folder as --out")
    if not any(key.method == FULL for key in last):
        raise InputError("results: no row is of the full cache, which all are compared with; run farkv eval again")
    kept, dropped = keep_comparable(last.values())
    groups: dict[tuple[str, int], dict[Setting, dict[int, Row]]] = {}
    proofs: dict[Setting, Counter[str]] = {}
    for row in kept:
        setting = Setting(row.method, float(row.fraction))
        groups.setdefault((row.task, row.length), {}).setdefault(setting, {})[row.seed] = row
        proofs.setdefault(setting, Counter())[row.proof] += 1
    study = Study([], [], proofs, {Setting(r.method, float(r.fraction)) for r in kept if r.query_aware}, dropped)
    for number, (place, group) in enumerate(groups.items()):
        full = next(of_setting for setting, of_setting in group.items() if setting.is_full)
        if any(row.gated for row in full.values()):
            scores = [row.score for row in full.values()]
            study.gated.append(Gated(*place, float(np.mean(scores)), len(scores)))
            continue
        chosen = {s: of_setting for s, of_setting in group.items() if len(of_setting) >= LEAST_SAMPLES * len(full)}
        study.cells.append(make_cell(place, chosen, [1, number], draws))
    return study


def keep_comparable(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Return the rows that have a score and the full cache's prompt, and how many have not."""
    rows = list(rows)
    prompts = {(r.task, r.length, r.seed): r.prompt_sha for r in rows if r.method == FULL}
    kept = [
        row
        for row in rows
        if to_number(row.score) is not None and prompts.get((row.task, row.length, row.seed)) == row.prompt_sha
    ]
    cells = {(row.task, row.length) for row in kept if row.method == FULL}
    kept = [row for row in kept if (row.task, row.length) in cells]
    if not kept:
        raise InputError("results: no row has a score; expected numbers from 0 to 1; run farkv eval again")
    return kept, len(rows) - len(kept)


def make_cell(
    place: tuple[str, int], group: Mapping[Setting, Mapping[int, Row]], seed: Sequence[int], draws: int
) -> Cell:
    """Return one cell over the samples that all its settings answered.

    Args:
        place: task and length.
        group: rows by setting and seed.
        seed: of the resamples.
        draws: how many resamples.
    """
    sizes = sorted(group, key=lambda s: len(group[s]))
    seeds = sorted(set(group[sizes[0]]).intersection(*(group[s] for s in sizes[1:])))
    # Settings that were stopped at different places may share nothing: then the full cache and those of its size.
    if not seeds:
        most = max(len(rows) for rows in group.values())
        group = {s: rows for s, rows in group.items() if s.is_full or len(rows) == most}
        seeds = sorted(set.intersection(*(set(rows) for rows in group.values())))
    table = [[group[s][seed] for s in group] for seed in seeds]
    scores = np.array([[float(row.score) for row in line] for line in table])
    with np.errstate(all="ignore"):
        measured = {name: average_measured([[getattr(r, name) for r in line] for line in table]) for name in MEASURES}
    depths = np.array([as_float(line[0].depth) for line in table])
    settings = {setting: column for column, setting in enumerate(group)}
    drawn = draw_means(scores, seed, draws)
    return Cell(*place, settings, seeds, scores, column_means(scores), drawn, measured, depths)


def average_measured(table: Sequence[Sequence[Any]]) -> Floats:
    """Return the mean of each column over the numbers in it, NaN where there is none.

    Args:
        table: `[n][m]`, numbers, booleans or None.
    """
    values = np.array([[as_float(value) for value in line] for line in table])
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), math.nan)


def to_number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def as_float(value: object) -> float:
    """Return a finite number, or NaN for anything else."""
    number = to_number(value)
    return math.nan if number is None else number
