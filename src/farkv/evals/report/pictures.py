"""The pictures that curves make: the averages with their legend, and one small picture per task and length.

In: tables. Out: HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from farkv.evals.cells import FULL
from farkv.evals.report.axes import round_range
from farkv.evals.report.curves import COSTS, GAP, KL, LARGE, SMALL, Cost, Worth, draw_curves, find_gap, name_class
from farkv.evals.report.element import Html, el
from farkv.evals.report.looks import Look, draw_marker
from farkv.evals.tables import Table

# How far below the full cache the enlarged picture reaches, and how far above it at least.
BELOW, ABOVE = 0.1, 0.01


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
    """Return the averages over all cells: score and difference over bytes read, the other costs, KL."""
    scores = [line.score for line in table.lines]
    whole = round_range([s.low for s in scores] + [s.high for s in scores])
    reads, *others = COSTS

    def draw(title: str, cost: Cost, y_range: tuple[float, float], *worth: Worth) -> Html:
        drawn = draw_curves(table, cost, looks, LARGE, y_range, *worth)
        return el("figure", el("figcaption", title), drawn, class_="panel")

    figures = [draw(reads.title, reads, whole)]
    full = table.find(FULL)
    if full is not None:
        above = max(ABOVE, *(find_gap(line)[2] for line in table.lines))
        figures.append(draw("Points to the full cache, paired; the last ten", reads, (-BELOW, min(above, BELOW)), GAP))
    figures += [draw(cost.title if cost.share else f"{cost.title} (noisy)", cost, whole) for cost in others]
    losses = [kl for line in table.lines if (kl := line.measured["kl"]) > 0]
    if len(losses) > 1:
        figures.append(draw(f"{KL.title} (ppl); down is better", reads, (min(losses) / 1.3, max(losses) * 1.3), KL))
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
