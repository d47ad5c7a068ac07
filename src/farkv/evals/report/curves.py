"""Pareto curves: quality over what it costs, one line per method, one point per fraction.

In: tables. Out: SVG. The full cache is a line across; the oracle is a ceiling, drawn where it attends, because the keys
that it reads to choose are no cost that anyone would pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from farkv.evals.cells import OURS
from farkv.evals.report.axes import Axis, draw_axes
from farkv.evals.report.element import Html, el, join
from farkv.evals.report.looks import Look, draw_marker
from farkv.evals.show import name_setting, number, percent, point_span, points, span
from farkv.evals.tables import Line, Table

# Nothing is read less than this, so that a logarithm exists.
LEAST = 1e-3


class Cost(NamedTuple):
    """What stands on the x axis."""

    title: str
    caption: str
    of: Callable[[Line], float]
    share: bool = True


def find_reads(line: Line) -> float:
    """Return the share of the cache's bytes that a step reads, the index included; of a bound what it attends."""
    return line.measured["read_fraction"] + (0.0 if line.bound else line.measured["index_fraction"])


COSTS = (
    Cost("Bytes read per step", "read + index, share of the full cache's bytes", find_reads),
    Cost("Bytes kept anywhere", "kept, share of the full cache's bytes", lambda line: line.measured["kept_fraction"]),
    Cost("Bytes held near", "resident, share of the full cache's bytes", lambda x: x.measured["resident_fraction"]),
    Cost("Speed", "tokens per second while decoding", lambda line: line.measured["tokens_per_s"], share=False),
)


class Frame(NamedTuple):
    """Size of a picture and of what is around its axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


LARGE, SMALL = Frame(440, 310, 52, 16, 12, 46), Frame(250, 172, 30, 10, 8, 24)


class Worth(NamedTuple):
    """What stands on the y axis: its value with the ends of its interval."""

    title: str
    of: Callable[[Line], tuple[float, float, float]]
    show: Callable[[float], str]
    log: bool = False


def find_gap(line: Line) -> tuple[float, float, float]:
    """Return the difference to the full cache with its paired interval, of the full cache itself nothing."""
    return (0.0, 0.0, 0.0) if line.delta is None else line.delta.delta[:3]


SCORE = Worth("score", lambda line: line.score[:3], lambda value: f"{100 * value:.3g}")
GAP = Worth("difference to the full cache", find_gap, lambda value: points(value).removesuffix(".0"))
KL = Worth(
    "KL to the full cache, nats per token",
    lambda x: (x.measured["kl"], x.measured["kl"], x.measured["kl"]),
    lambda value: f"{value:g}",
    log=True,
)


class Plot(NamedTuple):
    """One picture: both axes and what stands on them."""

    cost: Cost
    worth: Worth
    x: Axis
    y: Axis
    frame: Frame

    @property
    def is_large(self) -> bool:
        """Return whether there is room for units and intervals."""
        return self.frame is LARGE


def draw_curves(
    table: Table,
    cost: Cost,
    looks: Mapping[str, Look],
    frame: Frame,
    y_range: tuple[float, float],
    worth: Worth = SCORE,
) -> Html:
    """Return one picture of a table.

    Args:
        table: of which every line with a cost and a worth in the range is a point.
        cost: what stands on the x axis.
        looks: of the methods.
        frame: its size.
        y_range: of what stands on the y axis.
        worth: what that is.
    """
    known = [line for line in table.lines if math.isfinite(cost.of(line))]
    shown = [line for line in known if y_range[0] <= worth.of(line)[0] <= y_range[1]]
    if not shown:
        return el("p", "Nothing was measured.", class_="none")
    low, high = find_range([cost.of(line) for line in known], share=cost.share)
    x = Axis(low, high, frame.left, frame.width - frame.right, log=cost.share)
    y = Axis(*y_range, frame.height - frame.bottom, frame.top, log=worth.log)
    plot = Plot(cost, worth, x, y, frame)
    parts = [draw_frame(plot)]
    parts += [draw_full(line, plot, looks[line.setting.method]) for line in shown if line.setting.is_full]
    others = dict.fromkeys(line.setting.method for line in shown if not line.setting.is_full)
    # Ours is drawn last, above all others.
    for method in sorted(others, key=lambda name: name == OURS):
        of_method = sorted((x for x in shown if x.setting.method == method), key=lambda x: x.setting.fraction)
        parts.append(draw_curve(of_method, plot, looks[method]))
    said = f"{table.title}: {worth.title} over {cost.caption}. The same numbers stand in the table."
    return el("svg", *parts, viewBox=f"0 0 {frame.width} {frame.height}", role="img", aria_label=said)


def draw_frame(plot: Plot) -> Html:
    """Return the axes; in small pictures the unit stands above them, not at every number."""
    unit, x, y = " %" if plot.is_large else "", plot.x, plot.y
    show_x = (lambda v: f"{100 * v:.3g}{unit}") if plot.cost.share else number
    show_y = plot.worth.show if plot.worth is not SCORE else lambda v: plot.worth.show(v) + unit
    axes = draw_axes(x, y, show_x, show_y, 9 if plot.is_large else 7)
    if not plot.is_large:
        return axes
    middle, low = (x.start + x.end) / 2, plot.frame.height - 6
    return join([axes, el("text", plot.cost.caption, class_="label", x=middle, y=low, text_anchor="middle")])


def find_range(values: Sequence[float], *, share: bool) -> tuple[float, float]:
    """Return the range of a cost: of a share up to everything, of speed from nothing."""
    low, high = max(min(values), LEAST), max(*values, LEAST)
    return (min(low * 0.8, 0.5), 1.15 * max(1.0, high)) if share else (0.0, 1.08 * high)


def draw_full(line: Line, plot: Plot, look: Look) -> Html:
    """Return the full cache's line across and, on the axis of speed, where it stands on it."""
    place = plot.y.place(plot.worth.of(line)[0])
    parts = [el("line", class_="full", x1=plot.x.start, x2=plot.x.end, y1=place, y2=place)]
    if not plot.cost.share:
        parts.append(el("circle", class_="full-dot", cx=plot.x.place(plot.cost.of(line)), cy=place, r=4))
    return el("g", el("title", describe(line, plot)), *parts, class_=f"curve {look.name}")


def draw_curve(lines: Sequence[Line], plot: Plot, look: Look) -> Html:
    """Return a method's line, its markers, each with a tooltip, and in large pictures its intervals."""
    places = [plot.x.place(max(plot.cost.of(line), LEAST)) for line in lines]
    heights = [[plot.y.place(value) for value in plot.worth.of(line)] for line in lines]
    path = "M" + "L".join(f"{a:.1f} {b[0]:.1f}" for a, b in zip(places, heights, strict=True))
    parts = [el("path", class_="line", d=path)]
    for line, a, (b, low, high) in zip(lines, places, heights, strict=True):
        inside = [el("title", describe(line, plot))]
        if plot.is_large and low != high:
            inside.append(el("path", class_="whisker", d=f"M{a:.1f} {low:.1f}V{high:.1f}"))
        inside.append(el("path", class_="dot", d=draw_marker(look, a, b, 4.0 if plot.is_large else 3.0)))
        parts.append(el("g", *inside))
    return el("g", *parts, class_=name_class(look, lines[0].bound))


def name_class(look: Look, bound: bool) -> str:
    """Return the CSS classes of a method's curve."""
    kinds = ["curve", look.name, "aware" if look.aware else "blind"]
    return " ".join([*kinds, *(["bound"] if bound else []), *(["ours"] if look.method == OURS else [])])


def describe(line: Line, plot: Plot) -> str:
    """Return the tooltip of one point."""
    cost = plot.cost.of(line)
    value = percent(cost) if plot.cost.share else f"{number(cost)} tokens/s"
    score = f"score {percent(line.score.mean)} [{span(line.score)}]"
    worth = score if plot.worth is not KL else f"{KL.title} {number(line.measured['kl'])}"
    said = f"{name_setting(line.setting)}: {worth}, {plot.cost.title.lower()} {value}"
    if line.delta is not None:
        said += f", to full {points(line.delta.delta.mean)} [{point_span(line.delta.delta)}] points"
    return said
