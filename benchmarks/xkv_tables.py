"""Tables and the picture of docs/papers/xkv.md, from the rows that xkv_quality.py wrote.

    python benchmarks/xkv_tables.py     # draws docs/papers/xkv_layers.png, prints the tables

In: benchmarks/results/xkv_quality.jsonl. Out: Markdown. Differences are paired over prompts; intervals are percentile
bootstraps of 2000 draws, seeded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
QUALITY = ROOT / "benchmarks/results/xkv_quality.jsonl"
PICTURE = ROOT / "docs/papers/xkv_layers.png"
DRAWS = 2000
Rows = list[dict[str, Any]]


def read_rows(part: str, task: str | None = None, path: Path = QUALITY) -> Rows:
    """Read the rows of a part, and of a task if one is named."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in rows if r["part"] == part and task in (None, r["task"])]


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


def format_by_ratio(rows: Rows, column: str, title: str, pairs: list[tuple[str, str]], form: str = "{:.3f}") -> str:
    """Return one row per ratio: a column's mean by method, and paired differences."""
    found = collect(rows, column)
    methods = list(dict.fromkeys(method for method, _ in found))
    ratios = sorted({ratio for _, ratio in found})
    n = len(next(iter(found.values())))
    head = [f"{title} (n = {n})", *methods, *(f"{a} − {b}" for a, b in pairs)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for ratio in ratios:
        cells = [f"{ratio:g}"]
        cells += [form.format(np.mean(list(found[method, ratio].values()))) for method in methods]
        for a, b in pairs:
            mean, low, high = compare(found[a, ratio], found[b, ratio])
            sign = form.replace("{:", "{:+")
            cells.append(f"{sign.format(mean)} [{sign.format(low)}, {sign.format(high)}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_keep() -> str:
    """Return later mass, agreement and KL of recall, query-aware."""
    rows = read_rows("keep", "recall")
    return "\n\n".join(
        [
            format_by_ratio(rows, "mass", "later mass at kept share", OTHERS),
            format_by_ratio(rows, "agrees", "agrees with the full cache", [("xkv", "uniform"), ("loss", "uniform")]),
            format_by_ratio(rows, "kl", "KL", [("xkv", "uniform"), ("loss", "uniform")]),
        ]
    )


OTHERS = [("xkv", "uniform"), ("xkv", "pyramid"), ("xkv", "maxmin")]


def format_code() -> str:
    """Return later mass and KL of code."""
    rows = read_rows("keep", "code")
    return "\n\n".join(
        [
            format_by_ratio(rows, "mass", "later mass at kept share", OTHERS),
            format_by_ratio(rows, "kl", "KL", [("xkv", "uniform"), ("loss", "uniform")]),
        ]
    )


def format_agnostic() -> str:
    """Return agreement where the question comes after the eviction."""
    return format_by_ratio(read_rows("agnostic"), "agrees", "agrees, kept share", [("xkv", "uniform")])


def format_fetch() -> str:
    """Return agreement and KL of recall, and KL of code, under fetch caps."""
    pairs = [("plan, xkv", "one global cap"), ("plan, loss", "one global cap")]
    recall, code = read_rows("fetch", "recall"), read_rows("fetch", "code")
    return "\n\n".join(
        [
            format_by_ratio(recall, "agrees", "recall agrees, read share", pairs),
            format_by_ratio(recall, "kl", "recall KL", pairs, "{:.4f}"),
            format_by_ratio(code, "kl", "code KL", pairs, "{:.4f}"),
        ]
    )


def format_headline(ratio: float = 0.15) -> str:
    """Return the sentence of the README."""
    found = collect(read_rows("keep", "recall"), "agrees")
    n = len(found["loss", ratio])
    shares = {m: f"{np.mean(list(found[m, ratio].values())):.0%}" for m in ("loss", "uniform", "xkv")}
    return (
        f"Demo model, {ratio:.0%} of the cache kept, question in the prompt: the full cache's answer to "
        f"{shares['loss']}\nof {n} questions with `--rule loss`, to {shares['uniform']} with equal shares, to "
        f"{shares['xkv']} with the published objective."
    )


def format_least(bar: float = 0.99) -> str:
    """Return the least share from which on agreement stays at `bar`, keep-only and with nothing evicted."""
    lines = [f"| agreement stays ≥ {bar:.0%} from | share | lost |", "|---|---|---|"]
    for part, what in (("keep", "evicted, query-aware"), ("fetch", "nothing evicted, question after the text")):
        found = collect(read_rows(part, "recall"), "agrees")
        for method in dict.fromkeys(m for m, _ in found):
            good = [r for m, r in found if m == method and np.mean(list(found[m, r].values())) >= bar]
            bad = [r for m, r in found if m == method and r not in good]
            above = [r for r in good if not bad or r > max(bad)]
            share = f"{min(above):g} {'kept' if part == 'keep' else 'read'}" if above else "none measured"
            lines.append(f"| {method} | {share} | {what} |")
    return "\n".join(lines)


def format_layers() -> str:
    """Return, per layer, what losing all of its mass would cost at the measured slope, and rank correlations."""
    from scipy.stats import spearmanr

    points = collect_points(read_rows("layers"))
    tasks = list(points)
    names = ["layer", "KL per lost mass", *(f"rank correlation, {task}" for task in tasks)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for layer in points[tasks[0]]:
        x, y = np.array([p for task in tasks for p in points[task][layer]]).T
        slope = float((x * y).sum() / (x * x).sum())
        ranks = [f"{float(spearmanr(*np.array(points[task][layer]).T).statistic):.2f}" for task in tasks]
        lines.append(f"| {layer} | {slope:.4f} | {' | '.join(ranks)} |")
    whole = []
    for task in tasks:
        x, y = np.array([p for found in points[task].values() for p in found]).T
        whole.append(f"{float(spearmanr(x, y).statistic):.2f} on {task}")
    return "\n".join([*lines, "", f"Over all layers together the rank correlation is {' and '.join(whole)}."])


Points = dict[str, dict[int, list[tuple[float, float]]]]


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

    points = collect_points(read_rows("layers"))
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
    """Draw and print."""
    draw_layers()
    for make in (format_keep, format_code, format_agnostic, format_fetch, format_least, format_layers):
        print(make(), "\n")


if __name__ == "__main__":
    main()
