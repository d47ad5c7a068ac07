"""What the numbers say, in sentences that are made from them, the ones that are not flattering too.

In: a study and its tables. Out: sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from farkv.evals.cells import FULL, OURS, Setting, Study
from farkv.evals.report.looks import order_methods
from farkv.evals.show import fraction_text, length_text, percent, point_span, points
from farkv.evals.tables import Line, Table, compare

PROMISED = 0.1
# "Within one point of the full cache."
ONE_POINT = 0.01


class Said(NamedTuple):
    """The headline, and the sentences below it."""

    headline: str
    more: list[str]


def choose_fraction(study: Study) -> float | None:
    """Return the fraction nearest to 0.10, of ours where it was run; None where there is none."""
    fractions = [s.fraction for s in study.settings if s.method == OURS] or study.fractions
    return min(fractions, key=lambda fraction: abs(fraction - PROMISED), default=None)


def choose_subject(study: Study, table: Table, fraction: float) -> Line | None:
    """Return ours at a fraction; without it the best of the others."""
    ours = table.find(OURS, fraction)
    if ours is not None:
        return ours
    rivals = [line for line in table.at(fraction) if study.is_rival(line.setting)]
    return rivals[0] if rivals else None


def say(study: Study, table: Table) -> Said:
    """Return what a run says.

    Args:
        study: the cells.
        table: over all of them.
    """
    full, fraction = table.find(FULL), choose_fraction(study)
    if full is None:
        return Said("Nothing can be compared: the full cache itself is near the floor on every task.", [])
    line = None if fraction is None else choose_subject(study, table, fraction)
    if line is None or line.delta is None:
        return Said(f"The full cache scores {percent(full.score.mean)}; no other method was compared.", [])
    tasks = len({task for task, _ in table.cells})
    lengths = and_join(length_text(length) for length in sorted({length for _, length in table.cells}))
    name, gap = line.setting.method, line.delta.delta
    headline = (
        f"{name} at {fraction_text(line.setting.fraction)} scores {percent(line.score.mean)}, the full cache "
        f"{percent(full.score.mean)}: a difference of {points(gap.mean)} points [{point_span(gap)}], "
        f"{say_reads(line)}."
    )
    basis = (
        f"{tasks} task{'s' if tasks > 1 else ''} at {lengths} tokens, {table.samples} samples per method, the same "
        "for all. In brackets: what 95 % of a paired bootstrap lies between."
    )
    return Said(headline, [basis, say_promise(line), *say_rivals(study, table, name)])


def say_reads(line: Line) -> str:
    """Return what a step of a method reads, in words."""
    read, index = line.measured["read_fraction"], line.measured["index_fraction"]
    return f"reading {percent(read + index)} of its bytes per step ({percent(read)} cache, {percent(index)} index)"


def say_promise(line: Line) -> str:
    """Return whether a method is within one point of the full cache, as far as the interval tells."""
    if line.delta is None:
        return ""
    gap = line.delta.delta
    where = f"Within one point of the full cache at {fraction_text(line.setting.fraction)}"
    if gap.mean < -ONE_POINT:
        return f"{where}: no, {points(gap.mean)} points."
    if gap.low < -ONE_POINT:
        return f"{where}: on the mean yes ({points(gap.mean)}), but the interval reaches {points(gap.low)} points."
    return f"{where}: yes, the whole interval."


def say_rivals(study: Study, table: Table, name: str) -> list[str]:
    """Return, per fraction, who is better than a method, on average and on which tasks and lengths."""
    best, worse = [], []
    for fraction in study.fractions:
        line = table.find(name, fraction)
        if line is None:
            continue
        rivals = [x for x in table.at(fraction) if study.is_rival(x.setting)]
        if line.mark == "best":
            best.append(fraction_text(fraction))
        elif rivals:
            worse.append(say_gap(study, table, line, rivals[0]))
    said = []
    if best:
        said.append(f"Best on average of all methods but the oracle at {and_join(best)}.")
    if worse:
        said.append(f"Not best on average: {'; '.join(worse)}.")
    return said + [text for fraction in study.fractions if (text := say_lost_cells(study, table, name, fraction))]


def say_gap(study: Study, table: Table, line: Line, rival: Line) -> str:
    """Return by how much a rival is better, and whether that can be chance."""
    cells = [cell for cell in study.cells if (cell.task, cell.length) in set(table.cells)]
    gap = compare(cells, rival.setting, line.setting).delta
    chance = "not told apart from chance" if gap.low <= 0 else "more than chance"
    where, score = fraction_text(line.setting.fraction), percent(rival.score.mean)
    return f"at {where} {rival.setting.method} has {score}, {points(gap.mean)} points [{point_span(gap)}], {chance}"


def say_lost_cells(study: Study, table: Table, name: str, fraction: float) -> str:
    """Return on which cells some rival is better than a method by more than chance."""
    ours, lost = Setting(name, fraction), []
    for cell in study.cells:
        rivals = [s for s in cell.settings if study.is_rival(s) and s.fraction == fraction and s != ours]
        if ours not in cell.settings or not rivals:
            continue
        best = max(rivals, key=lambda s: cell.means[cell.settings[s]])
        gap = compare([cell], best, ours).delta
        if gap.low > 0:
            lost.append(f"{cell.task} at {length_text(cell.length)} ({best.method} {points(gap.mean)})")
    compared = sum(ours in cell.settings for cell in study.cells)
    if not lost:
        return ""
    where = fraction_text(fraction)
    return (
        f"At {where} some method is better by more than chance on {len(lost)} of {compared} cells: {', '.join(lost)}."
    )


def say_methods(settings: Sequence[Setting]) -> str:
    """Return methods with their fractions: `h2o, pages at 2 % and 5 %; random at 10 %`."""
    by_method: dict[str, list[str]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(fraction_text(setting.fraction))
    by_fractions: dict[str, list[str]] = {}
    for method in order_methods(by_method):
        by_fractions.setdefault(and_join(by_method[method]), []).append(method)
    return "; ".join(f"{', '.join(methods)} at {fractions}" for fractions, methods in by_fractions.items())


def and_join(names: Iterable[str]) -> str:
    """Return names as a list in a sentence: `a, b and c`."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
