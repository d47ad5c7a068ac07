"""Tables and the picture of docs/papers/xkv.md, from the rows that xkv_quality.py wrote.

    python benchmarks/xkv_tables.py     # draws docs/papers/xkv_layers.png, prints the tables

In: benchmarks/results/xkv_quality.jsonl. Out: Markdown. Differences are paired over prompts; intervals are percentile
bootstraps of 2000 draws, seeded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rows import Rows, format_rows, read_rows

QUALITY = "xkv_quality.jsonl"
PICTURE = Path(__file__).parent.parent / "docs/papers/xkv_layers.png"
DRAWS = 2000
Points = dict[str, dict[int, list[tuple[float, float]]]]
OTHERS = [("xkv", "uniform"), ("xkv", "pyramid"), ("xkv", "maxmin")]
ALLOCATED = [("xkv", "uniform"), ("loss", "uniform")]
CAPS = [("plan, xkv", "one global cap"), ("plan, loss", "one global cap")]
# Table by name: a part, a task, a column, its title, pairs to compare, digits.
BY_RATIO = {
    "keep": [
        ("keep", "recall", "mass", "later mass at kept share", OTHERS, 3),
        ("keep", "recall", "agrees", "agrees with the full cache", ALLOCATED, 3),
        ("keep", "recall", "kl", "KL", ALLOCATED, 3),
    ],
    "code": [
        ("keep", "code", "mass", "later mass at kept share", OTHERS, 3),
        ("keep", "code", "kl", "KL", ALLOCATED, 3),
    ],
    # Where the question comes after the eviction.
    "agnostic": [("agnostic", "recall", "agrees", "agrees, kept share", [("xkv", "uniform")], 3)],
    "fetch": [
        ("fetch", "recall", "agrees", "recall agrees, read share", CAPS, 3),
        ("fetch", "recall", "kl", "recall KL", CAPS, 4),
        ("fetch", "code", "kl", "code KL", CAPS, 4),
    ],
}


def collect(rows: Rows, column: str) -> dict[tuple[str, float], dict[int, float]]:
    """Return a column's value per (method, ratio) and prompt."""
    found: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["method"], row["ratio"]][row["seed"]] = float(row[column])
    return found


def compare(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, float]:
    """Return the mean paired difference a - b and its 95 % interval."""
    assert a.keys() == b.keys(), "rows of the same prompts are compared"
    difference = np.array([a[seed] - b[seed] for seed in sorted(a)])
    draws = np.random.default_rng(0).choice(difference, (DRAWS, len(difference))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def format_by_ratio(name: str) -> str:
    """Return a table's parts: one row per ratio, a column's mean by method, and paired differences."""
    blocks = []
    for part, task, column, title, pairs, digits in BY_RATIO[name]:
        found = collect(read_rows(QUALITY, part=part, task=task), column)
        methods = list(dict.fromkeys(method for method, _ in found))
        lines = []
        for ratio in sorted({ratio for _, ratio in found}):
            cells = [f"{ratio:g}", *(f"{average(found[method, ratio]):.{digits}f}" for method in methods)]
            for a, b in pairs:
                mean, low, high = compare(found[a, ratio], found[b, ratio])
                cells.append(f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
            lines.append(cells)
        n = len(next(iter(found.values())))
        blocks.append(format_rows([f"{title} (n = {n})", *methods, *(f"{a} − {b}" for a, b in pairs)], lines))
    return "\n\n".join(blocks)


def average(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def format_headline(ratio: float = 0.15) -> str:
    """Return the sentence of the README."""
    found = collect(read_rows(QUALITY, part="keep", task="recall"), "agrees")
    shares = {m: f"{average(found[m, ratio]):.0%}" for m in ("loss", "uniform", "xkv")}
    return (
        f"Demo model, {ratio:.0%} of the cache kept, question in the prompt: the full cache's answer to "
        f"{shares['loss']}\nof {len(found['loss', ratio])} questions with `--rule loss`, to {shares['uniform']} with "
        f"equal shares, to {shares['xkv']} with the published objective."
    )


def format_least(bar: float = 0.99) -> str:
    """Return the least share from which on agreement stays at `bar`, keep-only and with nothing evicted."""
    lines = []
    for part, what in (("keep", "evicted, query-aware"), ("fetch", "nothing evicted, question after the text")):
        found = collect(read_rows(QUALITY, part=part, task="recall"), "agrees")
        for method in dict.fromkeys(m for m, _ in found):
            good = [r for m, r in found if m == method and average(found[m, r]) >= bar]
            bad = [r for m, r in found if m == method and r not in good]
            above = [r for r in good if not bad or r > max(bad)]
            share = f"{min(above):g} {'kept' if part == 'keep' else 'read'}" if above else "none measured"
            lines.append([method, share, what])
    return format_rows([f"agreement stays ≥ {bar:.0%} from", "share", "lost"], lines)


def format_layers() -> str:
    """Return, per layer, what losing all of its mass would cost at the measured slope, and rank correlations."""
    from scipy.stats import spearmanr

    def correlate(found: list[tuple[float, float]]) -> str:
        return f"{float(spearmanr(*np.array(found).T).statistic):.2f}"

    points = collect_points(read_rows(QUALITY, part="layers"))
    lines = []
    for layer in next(iter(points.values())):
        x, y = np.array([p for layers in points.values() for p in layers[layer]]).T
        slope = float((x * y).sum() / (x * x).sum())
        lines.append([layer, f"{slope:.4f}", *(correlate(layers[layer]) for layers in points.values())])
    whole = [f"{correlate([p for f in layers.values() for p in f])} on {task}" for task, layers in points.items()]
    note = f"Over all layers together the rank correlation is {' and '.join(whole)}."
    return format_rows(["layer", "KL per lost mass", *(f"rank correlation, {task}" for task in points)], lines, note)


TABLES: dict[str, Callable[[], str]] = {
    "plan": format_headline,
    **{name: partial(format_by_ratio, name) for name in BY_RATIO},
    "least": format_least,
    "layers": format_layers,
}


def collect_points(rows: Rows) -> Points:
    """Return (1 - R_l, KL) per task and layer, mean over prompts, one point per share."""
    groups: dict[tuple[str, int, float], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        layer = int(row["method"].split()[1])
        groups[row["task"], layer, row["ratio"]].append((1 - row["layers"][layer], row["kl"]))
    points: Points = defaultdict(lambda: defaultdict(list))
    for (task, layer, _), found in sorted(groups.items()):
        x, y = np.mean(found, 0)
        points[task][layer].append((float(x), float(y)))
    return points


def draw_layers(path: Path = PICTURE) -> None:
    """Draw KL against 1 - R, one picture per task and one colour per layer."""
    from farkv.plot import import_matplotlib

    matplotlib = import_matplotlib()
    from matplotlib import pyplot

    points = collect_points(read_rows(QUALITY, part="layers"))
    figure, both = pyplot.subplots(1, len(points), figsize=(10, 4.2), sharey=True)
    for axes, (task, layers) in zip(both, points.items(), strict=True):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        for (layer, found), colour in zip(layers.items(), colours, strict=True):
            x, y = np.array(sorted(found)).T
            axes.plot(x, np.maximum(y, 1e-6), "o-", color=colour, markersize=4, linewidth=1, label=str(layer))
        axes.set(xlabel="attention mass that the evicted layer lost, 1 − R", yscale="log")
        axes.set_title(task, fontsize=10)
    both[0].set_ylabel("KL to the full model, nats")
    both[-1].legend(title="layer", frameon=False, ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    draw_layers()
    print(*(make() for make in TABLES.values()), sep="\n\n")


if __name__ == "__main__":
    main()
