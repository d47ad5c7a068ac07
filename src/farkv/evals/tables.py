"""The results of a run as tables: a line per method and fraction, means with intervals, differences to the full cache.

In: `DIR/results.jsonl`, or its rows. Out: tables for the README, the terminal (`evals.show`) and the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farkv.errors import InputError
from farkv.evals.cells import LEAST_CELLS, MEASURES, Cell, Gated, Setting, Study, average_known, study_rows
from farkv.evals.row import RESULTS, Row, read_rows
from farkv.evals.stats import Interval, Paired, interval
from farkv.quote import quote

# Smaller differences are rounding errors of sums.
TINY = 1e-9


class Line(NamedTuple):
    """One method at one fraction, over the cells of a table.

    delta: difference to the full cache, None for the full cache.  mark: `best` at this fraction, except upper bounds;
    `same` if the paired interval of its difference to the best contains zero; else empty.  measured: means of
    `cells.MEASURES`, NaN where not measured.
    """

    setting: Setting
    score: Interval
    delta: Paired | None
    measured: dict[str, float]
    proof: str
    aware: bool
    bound: bool
    mark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        gap = self.delta
        delta = gap and {**gap.delta._asdict(), "wins": gap.wins, "ties": gap.ties, "losses": gap.losses}
        known = {name: None if math.isnan(x) else x for name, x in self.measured.items()}
        named = {"proof": self.proof, "query_aware": self.aware, "bound": self.bound, "mark": self.mark}
        return {**self.setting._asdict(), "score": self.score._asdict(), "delta": delta, **known, **named}


class Table(NamedTuple):
    """Lines over the same cells and samples.

    cells: task and length of each.  absent: settings that answered too few cells to be compared.
    """

    title: str
    lines: list[Line]
    cells: list[tuple[str, int]]
    samples: int
    absent: list[Setting]
    gated: list[Gated]

    def find(self, method: str, fraction: float | None = None) -> Line | None:
        """Return a method's line at a fraction; None if there is none."""
        found = (x for x in self.lines if x.setting.method == method and fraction in {None, x.setting.fraction})
        return next(found, None)

    def at(self, fraction: float) -> list[Line]:
        """Return the lines of one fraction without the full cache, the best score first."""
        found = [line for line in self.lines if not line.setting.is_full and line.setting.fraction == fraction]
        return sorted(found, key=lambda line: -line.score.mean)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        cells = [{"task": task, "length": length} for task, length in self.cells]
        named = {"cells": cells, "samples": self.samples, "absent": [s._asdict() for s in self.absent]}
        lines, gated = [line.to_dict() for line in self.lines], [g._asdict() for g in self.gated]
        return {"title": self.title, **named, "lines": lines, "gated": gated}


def read_results(folder: Path) -> list[Row]:
    """Read the rows of a folder that `farkv eval` wrote.

    Raises:
        InputError: the file does not exist, is empty, or has a damaged line.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise InputError(f"folder {quote(folder)}: expected {RESULTS}, found none; write it with: farkv eval --out DIR")
    rows = read_rows(path)
    for n, row in enumerate(rows, start=1):
        check_row(row, f"file {quote(path)}, line {n}")
    if not rows:
        raise InputError(f"file {quote(path)}: expected rows of farkv eval, got an empty file; run farkv eval again")
    return rows


def check_row(row: Row, where: str) -> None:
    """Raise InputError unless the fields that identify a row have the right types."""
    kinds: dict[str, Any] = {"task": str, "method": str, "fraction": (int, float), "length": int, "seed": int}
    for name, kind in kinds.items():
        if not isinstance(getattr(row, name), kind):
            raise InputError(f"{where}: {name}: got {getattr(row, name)!r}; delete the line and run farkv eval again")


def make_table(
    source: Study | Iterable[Row], title: str = "all tasks", tasks: Sequence[str] = (), lengths: Sequence[int] = ()
) -> Table:
    """Average settings over the cells that all of them answered, with equal weights.

    A setting that answered fewer than LEAST_CELLS of the cells is listed as absent, so that no cell is lost for it.

    Args:
        source: a study, or rows.
        title: of the table.
        tasks, lengths: restrict the cells; empty: all.
    """
    study = source if isinstance(source, Study) else study_rows(source)

    def is_asked(place: Cell | Gated) -> bool:
        return (not tasks or place.task in tasks) and (not lengths or place.length in lengths)

    cells = [cell for cell in study.cells if is_asked(cell)]
    counts = {s: sum(s in cell.settings for cell in cells) for s in study.settings}
    compared = [s for s, n in counts.items() if n and n >= LEAST_CELLS * len(cells)]
    shared = [cell for cell in cells if all(s in cell.settings for s in compared)]
    if not shared:
        compared = [s for s, n in counts.items() if n and n == len(cells)]
        shared = cells
    absent = [s for s in study.settings if s not in compared]
    lines = mark_best(study, shared, [make_line(study, shared, setting) for setting in compared])
    places, samples = [(c.task, c.length) for c in shared], sum(len(c.seeds) for c in shared)
    return Table(title, lines, places, samples, absent, [g for g in study.gated if is_asked(g)])


def make_line(study: Study, cells: Sequence[Cell], setting: Setting) -> Line:
    """Return one setting's line over cells that it answered."""
    proofs = study.proofs[setting]
    proof = ", ".join(f"{name} {100 * n / proofs.total():.0f} %" for name, n in proofs.most_common())
    if len(proofs) == 1:
        proof = next(iter(proofs))
    columns = [(cell, cell.settings[setting]) for cell in cells]
    measured = average_known(np.array([cell.measured[i] for cell, i in columns]))
    mean = float(np.mean([cell.means[i] for cell, i in columns]))
    drawn = np.mean([cell.drawn[:, i] for cell, i in columns], axis=0)
    score = interval(mean, drawn, sum(len(cell.seeds) for cell in cells))
    delta = None if setting.is_full else compare(cells, setting, next(s for s in cells[0].settings if s.is_full))
    named: dict[str, float] = dict(zip(MEASURES, measured.tolist(), strict=True))
    return Line(setting, score, delta, named, proof, setting in study.aware, study.is_bound(setting))


def compare(cells: Sequence[Cell], a: Setting, b: Setting) -> Paired:
    """Return the mean of a_i - b_i over the samples of cells that both answered, with its paired interval."""
    # The same resamples are used for both columns of a cell.
    pairs = [(cell, cell.settings[a], cell.settings[b]) for cell in cells]
    every = np.concatenate([cell.scores[:, i] - cell.scores[:, j] for cell, i, j in pairs])
    mean = float(np.mean([cell.means[i] - cell.means[j] for cell, i, j in pairs]))
    drawn = np.mean([cell.drawn[:, i] - cell.drawn[:, j] for cell, i, j in pairs], axis=0)
    wins, losses = int((every > TINY).sum()), int((every < -TINY).sum())
    return Paired(interval(mean, drawn, len(every)), wins, len(every) - wins - losses, losses)


def mark_best(study: Study, cells: Sequence[Cell], lines: Sequence[Line]) -> list[Line]:
    """Mark, at every fraction, the best setting and those whose difference to it is not significant."""
    marked = []
    for line in lines:
        mark = ""
        if study.can_be_best(line.setting):
            same = [x for x in lines if x.setting.fraction == line.setting.fraction and study.can_be_best(x.setting)]
            gap = compare(cells, line.setting, max(same, key=lambda x: x.score.mean).setting).delta
            mark = "best" if gap.mean >= -TINY else "same" if gap.high >= -TINY else ""
        marked.append(line._replace(mark=mark))
    return marked
