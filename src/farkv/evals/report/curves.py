"""Pareto curves: quality against cost, one line per method, one point per fraction.

In: tables. Out: coordinates and texts that `parts.html` renders as SVG. The full cache is a horizontal line. An upper
bound such as the oracle is drawn at the bytes it reads, the keys that it selects by included. matplotlib is not used:
it is an optional extra, and its SVG has no tooltips and no classes for dark mode and hidden methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from farkv.evals.cells import OURS, Study
from farkv.evals.report.looks import Look
from farkv.evals.show import length_text, name_setting, number, percent, point_span, points, span
from farkv.evals.tables import Line, Table, make_table

# Lower end of a logarithmic axis of fractions.
LEAST = 1e-3
# Range of the enlarged plot below the full cache, and its minimum range above.
BELOW, ABOVE = 0.1, 0.01


class Cost(NamedTuple):
    """The quantity on the x axis; fractions are on a logarithmic axis."""

    title: str
    caption: str
    of: Callable[[Line], float]
    # Below small plots.
    short: str
    is_fraction: bool = True


class Worth(NamedTuple):
    """The quantity on the y axis: a value with the ends of its interval."""

    title: str
    unit: str
    of: Callable[[Line], tuple[float, float, float]]
    show: Callable[[float], str]
    log: bool = False


def find_reads(line: Line) -> float:
    """Return the fraction of the cache's bytes read per step: records, and the index, or keys, that were scored."""
    return line.measured["read_fraction"] + line.measured["index_fraction"]


def find_gap(line: Line) -> tuple[float, float, float]:
    """Return the difference to the full cache with its paired interval; zeros for the full cache itself."""
    return (0.0, 0.0, 0.0) if line.delta is None else line.delta.delta[:3]


def find_kl(line: Line) -> tuple[float, float, float]:
    """Return the KL to the full cache; it has no interval."""
    return line.measured["kl"], line.measured["kl"], line.measured["kl"]


READS = Cost("Bytes read per step", "read + index, % of the full cache's bytes", find_reads, "read + index, %")
COSTS = (
    Cost(
        "Bytes kept in any tier", "kept, % of the full cache's bytes", lambda x: x.measured["kept_fraction"], "kept, %"
    ),
    Cost(
        "Bytes held near", "resident, % of the full cache's bytes", lambda x: x.measured["resident_fraction"], "near, %"
    ),
    Cost("Speed", "tokens per second while decoding", lambda x: x.measured["tokens_per_s"], "tokens/s", False),
)
SCORE = Worth("score", "%", lambda line: line.score[:3], lambda value: f"{100 * value:.3g}")
GAP = Worth("difference to the full cache", "points", find_gap, lambda value: points(value).removesuffix(".0"))
KL = Worth("KL to the full cache", "nats per token", find_kl, "{:g}".format, log=True)


class Axis(NamedTuple):
    """Maps a range of values to a range of coordinates; `log`: on a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the coordinate of a value; values outside the range are clipped."""
        value = min(max(value, self.low), self.high)
        ends = (value, self.low, self.high)
        value, low, high = map(math.log, ends) if self.log else ends
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[float]:
        """Return round values on the axis, about `most` at most."""
        low, high = self.low * (1 - 1e-9), self.high * (1 + 1e-9)
        if not self.log:
            step = find_step(self.high - self.low, most)
            return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        ticks: list[float] = []
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [tick for p in range(-12, 12) for d in digits if low <= (tick := float(f"{d}e{p}")) <= high]
            if len(ticks) <= most:
                break
        return ticks[:: math.ceil(len(ticks) / most)] if len(ticks) > 1 else [self.low, self.high]


def find_step(width: float, most: int) -> float:
    """Return the smallest 1, 2, 5 or 10 times a power of ten that fits at most `most` times into a width."""
    power = 10.0 ** math.floor(math.log10(width / most))
    return next(step * power for step in (1, 2, 5, 10) if step * power * most >= width * (1 - 1e-9))


def round_range(values: Sequence[float], most: int = 5) -> tuple[float, float]:
    """Return a non-empty range with round ends that contains the values, within 0 to 1."""
    low, high = min(values), max(values)
    step = find_step(max(high - low, 0.02), most)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if high - low < step / 2:
        low, high = low - step, high + step
    return max(0.0, low), min(1.0, high)


class Frame(NamedTuple):
    """The size of a plot and the margins around its axes; only large plots have intervals."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    large: bool


LARGE, SMALL = Frame(440, 310, 62, 16, 12, 46, True), Frame(250, 190, 46, 12, 8, 40, False)


class Point(NamedTuple):
    """One setting: its coordinates, those of its interval's ends, its tooltip."""

    x: float
    y: float
    low: float
    high: float
    tooltip: str


class Picture(NamedTuple):
    """One plot. ticks: coordinates and labels of both axes.  curves: points per look, ours last and so on top."""

    title: str
    label: str
    frame: Frame
    cost: Cost
    worth: Worth
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    curves: Sequence[tuple[Look, list[Point]]] = ()


def draw_curves(
    table: Table, looks: Mapping[str, Look], frame: Frame, y_range: tuple[float, float],
    cost: Cost = READS, worth: Worth = SCORE, *, title: str,
) -> Picture:  # fmt: skip
    """Return one plot of a table.

    Args:
        table: each line with a known cost, and a worth inside the range, is a point.
        looks: of the methods.
        frame: size and margins.
        y_range: of the y axis.
        cost: on the x axis.
        worth: on the y axis.
        title: above the plot.
    """
    label = f"{table.title}: {worth.title}, {worth.unit}, over {cost.caption}. The table has the same numbers."
    known = [line for line in table.lines if math.isfinite(cost.of(line))]
    shown = [line for line in known if y_range[0] <= worth.of(line)[0] <= y_range[1]]
    if not shown:
        return Picture(title, label, frame, cost, worth)
    costs = [max(cost.of(line), LEAST) for line in known]
    x_range = (min(0.8 * min(costs), 0.5), 1.15 * max(1.0, *costs)) if cost.is_fraction else (0.0, 1.08 * max(costs))
    x = Axis(*x_range, frame.left, frame.width - frame.right, log=cost.is_fraction)
    y = Axis(*y_range, frame.height - frame.bottom, frame.top, log=worth.log)
    x_most = 9 if frame.large else 6
    x_ticks = [(x.place(v), f"{100 * v:.3g}" if cost.is_fraction else number(v)) for v in x.ticks(x_most)]
    y_ticks = [(y.place(v), worth.show(v)) for v in y.ticks(5)]
    curves: dict[str, list[Point]] = {}
    for line in sorted(shown, key=lambda x: (x.setting.method == OURS, not x.setting.is_full, x.setting.fraction)):
        middle, low, high = map(y.place, worth.of(line))
        point = Point(x.place(max(cost.of(line), LEAST)), middle, low, high, describe(line, cost, worth))
        curves.setdefault(line.setting.method, []).append(point)
    drawn = [(looks[name], points) for name, points in curves.items()]
    return Picture(title, label, frame, cost, worth, x_ticks, y_ticks, drawn)


def describe(line: Line, cost: Cost, worth: Worth) -> str:
    """Return the tooltip of one point."""
    paid = percent(cost.of(line)) if cost.is_fraction else f"{number(cost.of(line))} tokens/s"
    score = f"score {percent(line.score.mean)} [{span(line.score)}]"
    shown = f"{KL.title}, {KL.unit} {number(line.measured['kl'])}" if worth is KL else score
    text = f"{name_setting(line.setting)}: {shown}, {cost.title.lower()} {paid}"
    if line.delta is not None:
        text += f", to full {points(line.delta.delta.mean)} [{point_span(line.delta.delta)}] points"
    return text


def draw_averages(table: Table, looks: Mapping[str, Look]) -> list[Picture]:
    """Return the averages over all cells: score and difference over bytes read, score over other costs, KL."""
    whole = round_range([end for line in table.lines for end in line.score[1:3]])
    above = min(max(ABOVE, *(find_gap(line)[2] for line in table.lines)), BELOW)
    title = "Difference to the full cache in points, paired; enlarged"
    pictures = [
        draw_curves(table, looks, LARGE, whole, title=READS.title),
        draw_curves(table, looks, LARGE, (-BELOW, above), worth=GAP, title=title),
        *(draw_curves(table, looks, LARGE, whole, c, title=c.title + " (noisy)" * (not c.is_fraction)) for c in COSTS),
    ]
    losses = [kl for line in table.lines if (kl := line.measured["kl"]) > 0]
    if len(losses) > 1:
        y_range, title = (min(losses) / 1.3, max(losses) * 1.3), f"{KL.title}, {KL.unit}; lower is better"
        pictures.append(draw_curves(table, looks, LARGE, y_range, worth=KL, title=title))
    return pictures


def draw_cells(study: Study, looks: Mapping[str, Look]) -> list[Picture]:
    """Return one small plot per task and length, score over bytes read, all with the same score range."""
    named = [(f"{cell.task}, {length_text(cell.length)}", cell) for cell in study.cells]
    tables = [make_table(study, title, [cell.task], [cell.length]) for title, cell in named]
    return [draw_curves(table, looks, SMALL, (0.0, 1.0), title=table.title) for table in tables]
