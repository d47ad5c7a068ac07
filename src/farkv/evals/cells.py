"""Group rows into cells: one task at one length, the samples that all methods answered, their resampled means.

In: rows of `results.jsonl`. Out: comparable cells, gated cells, and the number of rows left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from farkv.errors import InputError
from farkv.evals.row import Row
from farkv.evals.stats import DRAWS, Floats, column_means, draw_means

FULL, OURS = "full", "infinigen"
# The proof of methods that read all keys to select: upper bounds, not baselines.
BOUND_PROOF = "every key"
# Averaged in addition to the score; None and NaN mean not measured.
MEASURES = (
    "agrees", "kl", "top1", "nll", "read_fraction", "index_fraction", "resident_fraction", "kept_fraction",
    "tokens_per_s",
)  # fmt: skip
# A method that answered a smaller fraction of a cell's samples, or of the cells, is not compared there. Otherwise one
# that was stopped early, or that ran at one length only, would remove the samples from the comparison of all others.
LEAST_SAMPLES, LEAST_CELLS = 0.8, 0.9


class Setting(NamedTuple):
    """The unit of comparison: a method at a fraction."""

    method: str
    fraction: float

    @property
    def is_full(self) -> bool:
        """Whether it is the full cache."""
        return self.method == FULL


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    settings: those compared here, with their column in all arrays.  seeds: the samples all of them answered, in row
    order.  scores: `[n, m]`.  means: `[m]`.  drawn: `[draws, m]`, bootstrap means; all columns use the same resamples.
    measured: `[m, measures]`, means of `MEASURES`, NaN where not measured.  depths: `[n]`, NaN where unknown.
    """

    task: str
    length: int
    settings: dict[Setting, int]
    seeds: list[int]
    scores: Floats
    means: Floats
    drawn: Floats
    measured: Floats
    depths: Floats


class Gated(NamedTuple):
    """A cell excluded from comparisons because the full cache itself is near the floor there."""

    task: str
    length: int
    full: float
    n: int


@dataclass(frozen=True)
class Study:
    """All cells of one run.

    proofs: counts of each proof in a setting's rows.  aware: settings whose selection sees the query.
    dropped: rows left out: without a score, or with another prompt than the full cache answered.
    """

    cells: list[Cell]
    gated: list[Gated]
    proofs: dict[Setting, Counter[str]]
    aware: set[Setting]
    dropped: int = 0

    @property
    def settings(self) -> list[Setting]:
        """All settings: the full cache first, then ours, then by name and fraction."""
        return sorted(self.proofs, key=lambda s: (not s.is_full, s.method != OURS, s.method, s.fraction))

    @property
    def fractions(self) -> list[float]:
        """The fractions of all methods but the full cache, ascending."""
        return sorted({s.fraction for s in self.proofs if not s.is_full})

    @property
    def methods(self) -> list[str]:
        """The methods' names in the order of `settings`."""
        return list(dict.fromkeys(s.method for s in self.settings))

    def is_bound(self, setting: Setting) -> bool:
        """Return whether a setting read all keys to select: an upper bound that saves nothing."""
        return set(self.proofs[setting]) == {BOUND_PROOF} or setting.method == "oracle"

    def can_be_best(self, setting: Setting) -> bool:
        """Return whether a setting is neither the full cache nor an upper bound."""
        return not setting.is_full and not self.is_bound(setting)


def study_rows(rows: Iterable[Row], draws: int = DRAWS) -> Study:
    """Group the rows of one run into cells and resample each; of rows with the same key the last one counts.

    Raises:
        InputError: there are no rows, or none of the full cache.

    Cost: draws random numbers per sample, independent of the number of methods.
    """
    last = {row.key: row for row in rows}
    if not last:
        raise InputError("results: there are no rows; run farkv eval first, with the same folder as --out")
    if not any(key.method == FULL for key in last):
        raise InputError("results: there is no row of the full cache to compare with; run farkv eval again")
    kept = keep_comparable(last.values())
    groups: dict[tuple[str, int], dict[Setting, dict[int, Row]]] = {}
    study = Study([], [], {}, set(), len(last) - len(kept))
    for row in kept:
        setting = Setting(row.method, float(row.fraction))
        groups.setdefault((row.task, row.length), {}).setdefault(setting, {})[row.seed] = row
        study.proofs.setdefault(setting, Counter())[row.proof] += 1
        if row.query_aware:
            study.aware.add(setting)
    for number, (place, group) in enumerate(groups.items()):
        full = next(rows for setting, rows in group.items() if setting.is_full)
        if any(row.gated for row in full.values()):
            study.gated.append(Gated(*place, float(np.mean([row.score for row in full.values()])), len(full)))
            continue
        chosen = {setting: rows for setting, rows in group.items() if len(rows) >= LEAST_SAMPLES * len(full)}
        study.cells.append(make_cell(place, chosen, [1, number], draws))
    return study


def keep_comparable(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a score and the full cache's prompt, from cells in which the full cache has a score."""
    rows = list(rows)
    prompts = {(r.task, r.length, r.seed): r.prompt_sha for r in rows if r.method == FULL}
    scored = [r for r in rows if not math.isnan(as_float(r.score))]
    kept = [r for r in scored if prompts.get((r.task, r.length, r.seed)) == r.prompt_sha]
    cells = {(r.task, r.length) for r in kept if r.method == FULL}
    kept = [r for r in kept if (r.task, r.length) in cells]
    if not kept:
        raise InputError("results: no row has a score; expected numbers from 0 to 1; run farkv eval again")
    return kept


def make_cell(
    place: tuple[str, int], group: Mapping[Setting, Mapping[int, Row]], seed: Sequence[int], draws: int
) -> Cell:
    """Return the cell of a (task, length) over the samples that all its settings answered.

    Args:
        group: rows by setting and sample seed.
        seed, draws: seed and number of the resamples.
    """
    # Settings that were stopped at different samples may have none in common: then keep the full cache and the longest.
    if not set.intersection(*map(set, group.values())):
        most = max(map(len, group.values()))
        group = {s: rows for s, rows in group.items() if s.is_full or len(rows) == most}
    seeds = sorted(set.intersection(*map(set, group.values())))
    scores = np.array([[float(group[s][i].score) for s in group] for i in seeds])
    values = np.array([[[as_float(getattr(group[s][i], name)) for name in MEASURES] for s in group] for i in seeds])
    depths = np.array([as_float(next(iter(group.values()))[i].depth) for i in seeds])
    columns = {setting: column for column, setting in enumerate(group)}
    drawn = draw_means(scores, seed, draws)
    return Cell(*place, columns, seeds, scores, column_means(scores), drawn, average_known(values), depths)


def average_known(values: Floats) -> Floats:
    """Return the means over the first axis, ignoring NaN; NaN where all are NaN."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def as_float(value: object) -> float:
    """Return a finite number as it is, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
