"""Pareto curves: quality over what it costs, one line per method, one point per fraction.

In: tables. Out: SVG. The full cache is a line across; the oracle is a ceiling, drawn where it attends, because the keys
that it reads to choose are no cost that anyone would pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from farkv.evals.report.axes import Axis, draw_axes, round_range
from farkv.evals.report.element import Html, el
from farkv.evals.report.looks import Look, draw_marker
from farkv.evals.show import name_setting, number, percent, point_span, points, span
from farkv.evals.tables import Line, Table

# Nothing is read less than this, so that a logarithm exists.
LEAST = 1e-3
OURS_FAMILY = "infinigen"


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


def draw_curves(
    table: Table, cost: Cost, looks: Mapping[str, Look], frame: Frame, y_range: tuple[float, float]
) -> Html:
    """Return one picture of a table.

    Args:
        table: of which every line with a cost is a point.
        cost: what stands on the x axis.
        looks: of the methods.
        frame: its size.
        y_range: of the scores.
    """
    shown = [line for line in table.lines if math.isfinite(cost.of(line))]
    if not shown:
        return el("p", "Nothing was measured.", class_="none")
    large = frame is LARGE
    low, high = find_range([cost.of(line) for line in shown], share=cost.share)
    x = Axis(low, high, frame.left, frame.width - frame.right, log=cost.share)
    y = Axis(*y_range, frame.height - frame.bottom, frame.top)
    # In small pictures the unit stands above them, not at every number.
    unit = " %" if large else ""
    show_x = (lambda v: f"{100 * v:.3g}{unit}") if cost.share else number
    parts = [draw_axes(x, y, show_x, lambda v: f"{100 * v:.0f}{unit}", 9 if large else 7)]
    if large:
        parts.append(
            el("text", cost.caption, class_="label", x=(x.start + x.end) / 2, y=frame.height - 6, text_anchor="middle")
        )
    full = [line for line in shown if line.setting.is_full]
    parts += [draw_full(line, cost, looks[line.setting.method], x, y) for line in full]
    others = dict.fromkeys(line.setting.method for line in shown if not line.setting.is_full)
    # Ours is drawn last, above all others.
    for method in sorted(others, key=lambda name: name == OURS_FAMILY):
        of_method = sorted((x for x in shown if x.setting.method == method), key=lambda x: x.setting.fraction)
        parts.append(draw_curve(of_method, cost, looks[method], x, y, large=large))
    name = f"{table.title}: score over {cost.caption}"
    box = f"0 0 {frame.width} {frame.height}"
    return el("svg", *parts, viewBox=box, role="img", aria_label=f"{name}. The same numbers stand in the table.")


def find_range(values: Sequence[float], *, share: bool) -> tuple[float, float]:
    """Return the range of a cost: of a share up to everything, of speed from nothing."""
    low, high = max(min(values), LEAST), max(*values, LEAST)
    return (min(low * 0.8, 0.5), 1.15 * max(1.0, high)) if share else (0.0, 1.08 * high)


def draw_full(line: Line, cost: Cost, look: Look, x: Axis, y: Axis) -> Html:
    """Return the full cache's line across and, on the axis of speed, where it stands on it."""
    place = y.place(line.score.mean)
    parts = [el("line", class_="full", x1=x.start, x2=x.end, y1=place, y2=place)]
    if not cost.share:
        parts.append(el("circle", class_="full-dot", cx=x.place(cost.of(line)), cy=place, r=4))
    return el("g", el("title", describe(line, cost)), *parts, class_=f"curve {look.name}")


def draw_curve(lines: Sequence[Line], cost: Cost, look: Look, x: Axis, y: Axis, *, large: bool) -> Html:
    """Return a method's line, its markers, each with a tooltip, and in large pictures its intervals."""
    spots = [(x.place(max(cost.of(line), LEAST)), y.place(line.score.mean)) for line in lines]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
    parts = [el("path", class_="line", d=path)]
    for line, (a, b) in zip(lines, spots, strict=True):
        inside = [el("title", describe(line, cost))]
        if large:
            whisker = f"M{a:.1f} {y.place(line.score.low):.1f}V{y.place(line.score.high):.1f}"
            inside.append(el("path", class_="whisker", d=whisker))
        inside.append(el("path", class_="dot", d=draw_marker(look, a, b, 4.0 if large else 3.0)))
        parts.append(el("g", *inside))
    return el("g", *parts, class_=name_class(look, lines[0].bound))


def name_class(look: Look, bound: bool) -> str:
    """Return the CSS classes of a method's curve."""
    kinds = ["curve", look.name, "aware" if look.aware else "blind"]
    return " ".join([*kinds, *(["bound"] if bound else []), *(["ours"] if look.method == OURS_FAMILY else [])])


def describe(line: Line, cost: Cost) -> str:
    """Return the tooltip of one point."""
    value = percent(cost.of(line)) if cost.share else f"{number(cost.of(line))} tokens/s"
    said = (
        f"{name_setting(line.setting)}: {percent(line.score.mean)} [{span(line.score)}], {cost.title.lower()} {value}"
    )
    if line.delta is not None:
        said += f", to full {points(line.delta.delta.mean)} [{point_span(line.delta.delta)}] points"
    return said


def draw_sample(look: Look, bound: bool) -> Html:
    """Return the piece of line that stands for a method in a legend."""
    if look.marker == "none":
        line: list[object] = [el("line", class_="full", x1=1, x2=33, y1=8, y2=8)]
    else:
        line = [el("path", class_="line", d="M1 8H33"), el("path", class_="dot", d=draw_marker(look, 17, 8))]
    named = el("g", *line, class_=name_class(look, bound).replace("curve ", "sample "))
    return el("svg", named, viewBox="0 0 34 16", width=34, height=16, aria_hidden="true")


def draw_legend(looks: Mapping[str, Look], bounds: set[str], *, boxes: bool) -> Html:
    """Return all methods with their lines.

    Args:
        looks: of the methods.
        bounds: those that are ceilings.
        boxes: also the box that shows or hides each; a page has them once, other legends are labels of the same boxes.
    """
    items = []
    for look in looks.values():
        box = el("input", type="checkbox", id=f"show-{look.name}", checked=True) if boxes else None
        said = f"{look.method} (ceiling)" if look.method in bounds else look.method
        label = el("label", draw_sample(look, look.method in bounds), said, for_=f"show-{look.name}", class_=look.name)
        items.append(el("span", *([box] if box else []), label, class_="key"))
    return el("div", *items, class_="legend", role="group", aria_label="Methods shown in the curves")


def draw_average(table: Table, looks: Mapping[str, Look]) -> Html:
    """Return the averages over all cells, one picture per cost."""
    scores = [line.score for line in table.lines]
    y_range = round_range([s.low for s in scores] + [s.high for s in scores])
    figures = []
    for cost in COSTS:
        noted = f"{cost.title}" + ("" if cost.share else " (one machine, noisy: see the note)")
        figures.append(
            el("figure", el("figcaption", noted), draw_curves(table, cost, looks, LARGE, y_range), class_="panel")
        )
    return el("div", *figures, class_="pair")


def draw_cells(tables: Sequence[Table], looks: Mapping[str, Look]) -> Html:
    """Return one small picture per task and length, quality over bytes read, all of the same range of scores."""
    figures = [
        el(
            "figure",
            el("figcaption", table.title),
            draw_curves(table, COSTS[0], looks, SMALL, (0.0, 1.0)),
            class_="panel",
        )
        for table in tables
    ]
    return el("div", *figures, class_="many")
