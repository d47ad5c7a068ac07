"""The findings as sentences generated from the numbers, including the unfavourable ones.

In: a study and its tables. Out: sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from farkv.evals.cells import FULL, OURS, Setting, Study
from farkv.evals.report.looks import order_methods
from farkv.evals.show import fraction_text, length_text, percent, point_span, points
from farkv.evals.stats import Interval
from farkv.evals.tables import Line, Table, compare

TARGET = 0.1
# The target: within one point of the full cache.
ONE_POINT = 0.01
# Below so many samples nothing is concluded: a bootstrap of few has far too short intervals.
FEW = 20
# Fewer samples of a cell cannot differ significantly, whatever they say: all of five by chance is one in 32.
FEW_IN_CELL = 6
# What none of n samples shows may still happen to three of n (95 %): equal answers prove no equality.
UNSEEN = 3.0


class Findings(NamedTuple):
    """The headline, and the sentences below it."""

    headline: str
    more: list[str]


def choose_fraction(study: Study, table: Table) -> float | None:
    """Return the fraction nearest to 0.1, among ours if it was run, of those in the table; None if there is none."""
    compared = [line.setting for line in table.lines if not line.setting.is_full] or study.settings
    fractions = [s.fraction for s in compared if s.method == OURS] or [s.fraction for s in compared if not s.is_full]
    return min(fractions, key=lambda fraction: abs(fraction - TARGET), default=None)


def list_best(study: Study, table: Table, fraction: float) -> list[Line]:
    """Return the lines of a fraction without upper bounds and the full cache, the best first."""
    return [line for line in table.at(fraction) if study.can_be_best(line.setting)]


def summarize(study: Study, table: Table) -> Findings:
    """Summarise a run, for our method or, if it was not run, for the best one."""
    full, fraction = table.find(FULL), choose_fraction(study, table)
    if full is None:
        return Findings("Nothing can be compared: the full cache itself is near the floor on every task.", [])
    lines = [] if fraction is None else [table.find(OURS, fraction), *list_best(study, table, fraction)]
    line = next(filter(None, lines), None)
    if line is None or line.delta is None:
        return Findings(f"The full cache scores {percent(full.score.mean)}; no other method was compared.", [])
    tasks = len({task for task, _ in table.cells})
    lengths = and_join(length_text(length) for length in sorted({length for _, length in table.cells}))
    name, gap = line.setting.method, line.delta.delta
    read, index = line.measured["read_fraction"], line.measured["index_fraction"]
    n = table.samples
    doubt = f" Only {n} sample{'s' if n > 1 else ''}: too few to say more." if n < FEW else ""
    headline = (
        f"{name} at {fraction_text(line.setting.fraction)} scores {percent(line.score.mean)}, the full cache "
        f"{percent(full.score.mean)}: a difference of {points(gap.mean)} points [{point_span(gap)}], "
        f"reading {percent(read + index)} of its bytes per step ({percent(read)} cache, {percent(index)} index).{doubt}"
    )
    basis = (
        f"{tasks} task{'s' if tasks > 1 else ''} at {lengths} tokens, {table.samples} samples per method, the same "
        "for all. In brackets: the 95 % interval of a paired bootstrap."
    )
    where = f"Within one point of the full cache at {fraction_text(line.setting.fraction)}"
    verdict = f"{where}: {judge_gap(gap, n)}."
    if n < FEW:
        return Findings(headline, [basis, verdict])
    return Findings(headline, [basis, verdict, *compare_baselines(study, table, name)])


def judge_gap(gap: Interval, n: int) -> str:
    """Return whether a difference to the full cache is less than a point, as far as n samples can tell."""
    if n < FEW:
        return f"too few samples to say ({n}, expected {FEW} or more)"
    if gap.high < -ONE_POINT:
        return f"no, {points(gap.mean)} points"
    if gap.mean < -ONE_POINT:
        return f"on average no ({points(gap.mean)}), but the interval reaches {points(gap.high)} points"
    if gap.low < -ONE_POINT:
        return f"on average yes ({points(gap.mean)}), but the interval reaches {points(gap.low)} points"
    if UNSEEN / n > ONE_POINT:
        unseen = points(UNSEEN / n).removeprefix("+")
        return f"as far as {n} samples tell, yes; a loss of up to {unseen} points may show in none of them"
    return "yes, with the whole interval"


def compare_baselines(study: Study, table: Table, name: str) -> list[str]:
    """List, per fraction, the baselines that are better than a method, on average and per task and length."""
    best, worse = [], []
    cells = [cell for cell in study.cells if (cell.task, cell.length) in set(table.cells)]
    for fraction in study.fractions:
        line, lines = table.find(name, fraction), list_best(study, table, fraction)
        where = fraction_text(fraction)
        if line is not None and line.mark == "best":
            best.append(where)
        elif line is not None and lines:
            other = lines[0]
            gap = compare(cells, other.setting, line.setting).delta
            chance = "not significant" if gap.low <= 0 else "significant"
            shown = f"{percent(other.score.mean)}, {points(gap.mean)} points [{point_span(gap)}]"
            worse.append(f"at {where} {other.setting.method} has {shown}, {chance}")
    found = [f"Best on average of all methods except the oracle at {and_join(best)}."] if best else []
    found += [f"Not best on average: {'; '.join(worse)}."] if worse else []
    return found + [text for f in study.fractions if (text := list_lost_cells(study, Setting(name, f)))]


def list_lost_cells(study: Study, ours: Setting) -> str:
    """List the cells on which some baseline is significantly better; empty if there are none."""
    lost, compared = [], [cell for cell in study.cells if ours in cell.settings]
    for cell in compared:
        if len(cell.scores) < FEW_IN_CELL:
            continue
        others = [s for s in cell.settings if study.can_be_best(s) and s.fraction == ours.fraction and s != ours]
        if not others:
            continue
        best = max(others, key=lambda s: cell.means[cell.settings[s]])
        gap = compare([cell], best, ours).delta
        if gap.low > 0:
            lost.append(f"{cell.task} at {length_text(cell.length)} ({best.method} {points(gap.mean)})")
    where = f"At {fraction_text(ours.fraction)} some method is significantly better"
    return f"{where} on {len(lost)} of {len(compared)} cells: {', '.join(lost)}." if lost else ""


def list_methods(settings: Sequence[Setting]) -> str:
    """List methods with their fractions: `h2o, pages at 2 % and 5 %; random at 10 %`."""
    by_method: dict[str, list[str]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(fraction_text(setting.fraction))
    by_fractions: dict[str, list[str]] = {}
    for method in order_methods(by_method):
        by_fractions.setdefault(and_join(by_method[method]), []).append(method)
    return "; ".join(f"{', '.join(methods)} at {fractions}" for fractions, methods in by_fractions.items())


def and_join(names: Iterable[str]) -> str:
    """Join names as in a sentence: `a, b and c`."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
