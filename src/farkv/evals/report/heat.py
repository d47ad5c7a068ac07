"""Retrieval heat maps: the share of needles that each method found, by the needle's depth and the text's length.

In: cells of tasks whose samples know the depth of the asked line. Out: SVG, one map per method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from farkv.evals.cells import Cell, Setting, Study
from farkv.evals.report.element import Html, break_name, el
from farkv.evals.report.looks import order_methods
from farkv.evals.show import length_text, percent
from farkv.evals.stats import Floats

# Samples that a field should have on average, before there are more bins of depth.
ENOUGH = 6
MOST_BINS = 10
WIDTH, HEIGHT, LEFT, TOP = 44, 20, 50, 4


def find_known(study: Study) -> list[Cell]:
    """Return the cells of which samples have a depth."""
    return [cell for cell in study.cells if np.isfinite(cell.depths).any()]


def count_bins(cells: Sequence[Cell]) -> int:
    """Return into how many bins depths are sorted: 4 to 10, so that fields have a few samples."""
    by_length: dict[int, int] = {}
    for cell in cells:
        by_length[cell.length] = by_length.get(cell.length, 0) + int(np.isfinite(cell.depths).sum())
    return max(4, min(MOST_BINS, min(by_length.values()) // ENOUGH))


def bin_scores(cells: Sequence[Cell], setting: Setting, n_bins: int) -> tuple[list[int], Floats, Floats]:
    """Return the mean score of a setting by depth and length.

    Args:
        cells: with depths; those that the setting did not answer are passed over.
        setting: whose scores.
        n_bins: of depth.

    Returns:
        Lengths, means `[n_bins, lengths]`, NaN where there is no sample, and the counts.
    """
    lengths = sorted({cell.length for cell in cells})
    total, count = np.zeros((n_bins, len(lengths))), np.zeros((n_bins, len(lengths)))
    for cell in cells:
        if setting not in cell.settings:
            continue
        known = np.isfinite(cell.depths)
        bins = np.clip((cell.depths[known] * n_bins).astype(int), 0, n_bins - 1)
        column = lengths.index(cell.length)
        np.add.at(total[:, column], bins, cell.scores[known, cell.settings[setting]])
        np.add.at(count[:, column], bins, 1)
    return lengths, total / np.where(count > 0, count, np.nan), count


def draw_map(lengths: Sequence[int], means: Floats, counts: Floats, name: str) -> Html:
    """Return one map: depth downward, length to the right, the number in every field."""
    n_bins = len(means)
    width, height = LEFT + WIDTH * len(lengths) + 2, TOP + HEIGHT * n_bins + 20
    parts: list[Html] = []
    for row in range(n_bins):
        y = TOP + HEIGHT * row
        if row % (2 if n_bins > 5 else 1) == 0:
            parts.append(el("text", percent(row / n_bins, 0), class_="tick", x=LEFT - 6, y=y + 14, text_anchor="end"))
        for column, length in enumerate(lengths):
            mean, x = float(means[row, column]), LEFT + WIDTH * column
            place = {"x": x + 1, "y": y + 1, "width": WIDTH - 2, "height": HEIGHT - 2, "rx": 2}
            if np.isnan(mean):
                parts.append(el("rect", class_="field empty", **place))
                continue
            depth = f"{percent(row / n_bins, 0)} to {percent((row + 1) / n_bins, 0)} deep"
            said = f"{length_text(length)}, {depth}: {percent(mean)}, n = {counts[row, column]:.0f}"
            field = el("rect", class_="field", fill_opacity=round(mean, 3), **place)
            strong = "value on" if mean > 0.77 else "value"
            number = el("text", f"{100 * mean:.0f}", class_=strong, x=x + WIDTH / 2, y=y + 14, text_anchor="middle")
            parts.append(el("g", el("title", said), field, number))
    for column, length in enumerate(lengths):
        x = LEFT + WIDTH * (column + 0.5)
        parts.append(el("text", length_text(length), class_="tick", x=x, y=height - 5, text_anchor="middle"))
    said = f"{name}: score by depth of the needle, downward, and length of the text, to the right"
    return el("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=said)


def draw_retrieval(study: Study, fraction: float) -> Html:
    """Return the maps of all methods at one fraction, the full cache's first."""
    cells = find_known(study)
    n_bins = count_bins(cells)
    figures = []
    shown = {s.method: s for s in study.settings if s.is_full or s.fraction == fraction}
    for method in order_methods(shown):
        setting = shown[method]
        lengths, means, counts = bin_scores(cells, setting, n_bins)
        if counts.any():
            drawn = draw_map(lengths, means, counts, method)
            figures.append(el("figure", el("figcaption", break_name(method)), drawn))
    width = LEFT + WIDTH * len({cell.length for cell in cells}) + 12
    return el("div", *figures, class_="maps", style=f"--map:{max(width, 150)}px")


def list_tasks(study: Study) -> Mapping[str, int]:
    """Return the tasks in the maps, and their samples per method."""
    tasks: dict[str, int] = {}
    for cell in find_known(study):
        tasks[cell.task] = tasks.get(cell.task, 0) + int(np.isfinite(cell.depths).sum())
    return tasks
