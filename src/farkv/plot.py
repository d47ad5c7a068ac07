"""Plot gain curves and layer allocations to an image file. Needs the `plot` extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farkv.calibrate.plan import Plan
from farkv.errors import ConfigError
from farkv.files import write_file
from farkv.quote import quote

if TYPE_CHECKING:
    from farkv.calibrate.curves import Curves


def import_matplotlib() -> Any:
    """Return matplotlib with a backend that needs no display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot: matplotlib is not installed; install it: pip install 'farkv[plot]'") from error
    matplotlib.use("Agg")
    return matplotlib


# Labelled layers on an axis; the least distance between labels on curves, as shares of both axes.
MOST_TICKS = 12
LABEL_GAP = 0.05


def plot_plan(plan: Plan, curves: Curves, path: str | Path, name: str = "") -> None:
    """Plot, for each lever of a plan, every layer's gain curve with its share marked, and the shares as bars.

    Args:
        name: of the model, or its profile, for the title.

    Raises:
        ConfigError: matplotlib is not installed, or draws no such picture.
        StoreError: the file cannot be written.
    """
    matplotlib = import_matplotlib()
    from matplotlib import pyplot
    from matplotlib.patheffects import withStroke

    from farkv.calibrate.curves import GRID

    figure, axes = pyplot.subplots(len(plan.levers), 2, figsize=(11, 3.6 * len(plan.levers)), squeeze=False)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(plan.layers)))
    x = np.linspace(0, 1, GRID + 1)
    for (left, right), (lever, allocation) in zip(axes, plan.levers.items(), strict=True):
        rows = curves.mean("spread" if lever == "fetch" else "keep").numpy()
        most = min(1.0, 2.5 * max(allocation.shares) + 0.02)
        ends: list[tuple[float, float]] = []
        for row, share, colour in zip(rows, allocation.shares, colours, strict=True):
            held = np.concatenate([[0.0], row.cumsum()])
            left.plot(x, held, color=colour, linewidth=1.2)
            ends.append((share, float(np.interp(share, x, held))))
            left.plot(*ends[-1], "o", color=colour, markersize=5)
        for i in choose_labels([(share / most, held) for share, held in ends]):
            left.annotate(
                str(plan.layers[i]), ends[i], textcoords="offset points", xytext=(5, -10), fontsize=8,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        mean, equal = np.mean(allocation.retention), np.mean(allocation.uniform)
        left.set(xlabel="records, % of the context", ylabel="attention mass held, %", ylim=(0, 1.02), xlim=(0, most))
        left.set_title(f"{lever}: what each layer's best records hold (numbers: layers)", fontsize=10)
        right.bar(range(len(plan.layers)), allocation.shares, color=colours)
        right.axhline(allocation.ratio, color="black", linewidth=1, linestyle="--", label=f"equal: holds {equal:.1%}")
        step = -(-len(plan.layers) // MOST_TICKS)
        right.set_xticks(range(0, len(plan.layers), step), [str(i) for i in plan.layers[::step]])
        right.set(xlabel="layer", ylabel="records, % of the context")
        right.set_title(f"{lever}: {allocation.rule} holds {mean:.1%} of the mass", fontsize=10)
        right.legend(frameon=False)
        for axis in (left.xaxis, left.yaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    tokens = curves.tokens.float().mean()
    measured = f"{len(curves.tokens)} prompts of {tokens:,.0f} tokens on average"
    figure.suptitle(f"{name}: {len(plan.layers)} layers, {measured}".removeprefix(": "), fontsize=11)
    figure.tight_layout()
    save_figure(figure, path)


def choose_labels(places: Sequence[tuple[float, float]]) -> list[int]:
    """Return which of these places can be labelled so that no two labels overlap, the outermost first.

    Args:
        places: as shares of both axes.
    """
    order = sorted(range(len(places)), key=lambda i: -places[i][0])
    chosen: list[int] = []
    for i in order:
        if all(max(abs(places[i][0] - places[j][0]), abs(places[i][1] - places[j][1])) >= LABEL_GAP for j in chosen):
            chosen.append(i)
    return sorted(chosen)


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Write a figure in the form that the name ends in (png where it has none), and close it.

    Raises:
        ConfigError: no picture has such an ending.
        StoreError: the file cannot be written; what was there before still is.
    """
    from matplotlib import pyplot

    # Drawn in memory: a picture that cannot be drawn, or has no room, leaves nothing behind.
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=130, **options)
    except ValueError as error:
        raise ConfigError(
            f"--plot: cannot draw {quote(path)} ({error}); expected a name like plan.png, .svg or .pdf"
        ) from error
    finally:
        pyplot.close(figure)
    write_file(path, drawn.getvalue(), "picture")
