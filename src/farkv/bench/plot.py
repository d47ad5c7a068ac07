"""Plot milliseconds per layer against the context. Needs the `plot` extra."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from farkv.bench.report import OURS, Report, Row
from farkv.plot import import_matplotlib, save_figure

COLOURS = {
    OURS: "#c1272d",
    "infinigen-int8": "#e0713a",
    "infinigen-int4": "#eaa46b",
    "dense-native": "#1f5c99",
    "matmul-bf16": "#3f8f5b",
    "matmul-fp32": "#7fbf8f",
    "llama.cpp": "#7b5ea7",
}
GREYS = ("#4d4d4d", "#808080", "#a6a6a6", "#c0c0c0")
# Minimum distance between labels at the right edge, in points.
LABEL_POINTS = 11
# Labelled contexts.
MOST_TICKS = 8


def plot_rows(report: Report, path: str | Path) -> None:
    """Plot one line per method, labelled at its end, and farkv's floor as a dashed line.

    Raises:
        ConfigError: matplotlib is not installed, or draws no such picture.
        StoreError: the file cannot be written.
    """
    import_matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5.2))
    greys = iter(GREYS * 4)
    ends: list[tuple[str, float, str]] = []
    for name in dict.fromkeys(row.method for row in report.rows):
        rows = sorted((row for row in report.rows if row.method == name), key=lambda row: row.context)
        colour = COLOURS.get(name) or next(greys)
        draw_method(axes, rows, colour)
        ends.append((name, rows[-1].ms_per_layer, colour))
        floors = [row.floor_ms for row in rows if row.floor_ms is not None]
        if name == OURS and len(floors) == len(rows):
            axes.plot([row.context for row in rows], floors, "--", color=colour, linewidth=1)
            ends.append((f"{OURS}: floor", floors[-1], colour))
    dress_axes(axes, report)
    figure.tight_layout()
    label_ends(axes, ends, max(row.context for row in report.rows))
    save_figure(figure, path, bbox_inches="tight")


def draw_method(axes: Any, rows: list[Row], colour: str) -> None:
    """Plot a method's medians as a line and its quartiles as a band."""
    x = [row.context for row in rows]
    width = 2.4 if rows[0].method == OURS else 1.5
    axes.plot(x, [row.ms_per_layer for row in rows], "o-", color=colour, linewidth=width, markersize=4)
    axes.fill_between(
        x, [row.ms_low for row in rows], [row.ms_high for row in rows], color=colour, alpha=0.15, linewidth=0
    )


def dress_axes(axes: Any, report: Report) -> None:
    """Set scales, ticks and titles."""
    contexts = sorted({row.context for row in report.rows})
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms per layer and token")
    shown = thin_out(contexts, MOST_TICKS)
    labels = [f"{n // 1024} K" if n % 1024 == 0 else str(n) for n in shown]
    axes.set_xticks(shown, labels, minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(axis="y", which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    machine = report.machine
    axes.set_title(report.title, fontsize=10, loc="left", pad=20)
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    axes.text(
        0, 1.02, f"{machine['cpu']}, {threads}, kernel {machine['kernel']}", transform=axes.transAxes, fontsize=8,
        color="#666666",
    )  # fmt: skip


def thin_out(contexts: list[int], most: int) -> list[int]:
    """Return at most `most` ascending contexts, the last one among them, none within an eighth of the axis' length."""
    if len(contexts) < 2:
        return contexts
    least = (math.log(contexts[-1]) - math.log(contexts[0])) / most
    kept = contexts[-1:]
    for n in reversed(contexts[:-1]):
        if math.log(kept[0]) - math.log(n) >= least * (1 - 1e-9):
            kept.insert(0, n)
    return kept


def label_ends(axes: Any, ends: list[tuple[str, float, str]], x: float) -> None:
    """Label every line at its right end, moving labels apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    points = 72 / axes.figure.dpi
    heights = [axes.transData.transform((x, y))[1] * points for _, y, _ in ends]
    for (name, y, colour), height, place in zip(ends, heights, spread_out(heights, LABEL_POINTS), strict=True):
        axes.annotate(
            name, (x, y), xytext=(9, place - height), textcoords="offset points", color=colour, fontsize=9, va="center",
            fontweight="bold" if name == OURS else "normal", annotation_clip=False,
        )  # fmt: skip


def spread_out(heights: list[float], least: float) -> list[float]:
    """Return positions at least `least` apart, in the same order, as close as possible to the ascending `heights`."""
    # Labels that would overlap form a group, which is centred on the mean of its members' heights.
    groups: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        groups.append((height - i * least, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, n), (b, m) = groups[-2:]
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    bases = [base for base, n in groups for _ in range(n)]
    return [base + i * least for i, base in enumerate(bases)]
