"""Plot gain curves and layer allocations to an image file. Needs the `plot` extra."""

from __future__ import annotations

import io
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


def plot_plan(plan: Plan, curves: Curves, path: str | Path) -> None:
    """Plot, for each lever of a plan, every layer's gain curve with its share marked, and the shares as bars.

    Raises:
        ConfigError: matplotlib is not installed, or draws no such picture.
        StoreError: the file cannot be written.
    """
    matplotlib = import_matplotlib()
    from matplotlib import pyplot

    from farkv.calibrate.curves import GRID

    figure, axes = pyplot.subplots(len(plan.levers), 2, figsize=(11, 3.6 * len(plan.levers)), squeeze=False)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(plan.layers)))
    x = np.linspace(0, 1, GRID + 1)
    for (left, right), (name, allocation) in zip(axes, plan.levers.items(), strict=True):
        rows = curves.mean("spread" if name == "fetch" else "keep").numpy()
        for layer, row, share, colour in zip(plan.layers, rows, allocation.shares, colours, strict=True):
            held = np.concatenate([[0.0], row.cumsum()])
            left.plot(x, held, color=colour, linewidth=1.2)
            left.plot(share, np.interp(share, x, held), "o", color=colour, markersize=5)
            left.annotate(str(layer), (share, np.interp(share, x, held)), textcoords="offset points", xytext=(4, -9))
        mean, equal = np.mean(allocation.retention), np.mean(allocation.uniform)
        left.set(xlabel="share of the context's records", ylabel="attention mass held", ylim=(0, 1.02))
        left.set_xlim(0, min(1.0, 2.5 * max(allocation.shares) + 0.02))
        left.set_title(f"{name}: curves and shares, by layer", fontsize=10)
        right.bar(range(len(plan.layers)), allocation.shares, color=colours)
        right.axhline(allocation.ratio, color="black", linewidth=1, linestyle="--", label=f"equal: holds {equal:.1%}")
        right.set_xticks(range(len(plan.layers)), [str(i) for i in plan.layers])
        right.set(xlabel="layer", ylabel="share of the context's records")
        right.set_title(f"{name}: {allocation.rule} holds {mean:.1%} of the mass", fontsize=10)
        right.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


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
