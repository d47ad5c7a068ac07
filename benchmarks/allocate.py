"""How long does an allocation take? The water level against a sort of all gains and a greedy on a heap.

    python benchmarks/allocate.py --out benchmarks/results/allocate.jsonl

In: power-law gain curves of 32 layers, float32. Out: a JSON line per problem, length and solver: the median time on
one core, validation included where the solver validates, and its ratio to farkv's. All must agree on the answer.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from farkv.math.allocate import allocate, measure_retention

LAYERS, RATIO, RETENTION = 32, 0.2, 0.9
PROBLEMS: dict[str, dict[str, Any]] = {"P1": {"ratio": RATIO}, "P2": {"retention": RETENTION}}
Solver = Callable[[np.ndarray, str], np.ndarray]


def make_gains(tokens: int, seed: int = 0) -> np.ndarray:
    """Return curves [LAYERS, tokens] whose layers differ as those of models do: decay exponents 0.5 to 1.5."""
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.5, 1.5, (LAYERS, 1))
    return (np.arange(1, tokens + 1) ** -decay * rng.uniform(0.5, 2, (LAYERS, 1))).astype(np.float32)


def solve_level(gains: np.ndarray, problem: str) -> np.ndarray:
    """Solve by farkv."""
    return allocate(gains, **PROBLEMS[problem])


def solve_sort(gains: np.ndarray, problem: str) -> np.ndarray:
    """Solve by one sort of all normalised gains."""
    shares = (gains / gains.sum(1, dtype=float, keepdims=True)).ravel()
    order = np.argsort(-shares, kind="stable")
    if problem == "P1":
        tokens = int(RATIO * gains.size)
    else:
        tokens = int(np.searchsorted(np.cumsum(shares[order]), RETENTION * LAYERS)) + 1
    return np.bincount(order[:tokens] // gains.shape[1], minlength=LAYERS)


def solve_heap(gains: np.ndarray, problem: str) -> np.ndarray:
    """Solve token by token, the largest next gain from a heap, as published but for the heap."""
    rows = (gains / gains.sum(1, dtype=float, keepdims=True)).tolist()
    heap = [(-row[0], layer, 0) for layer, row in enumerate(rows)]
    heapq.heapify(heap)
    counts, kept, left = [0] * LAYERS, 0.0, int(RATIO * gains.size)
    while left if problem == "P1" else kept < RETENTION * LAYERS:
        gain, layer, taken = heap[0]
        counts[layer] += 1
        kept, left = kept - gain, left - 1
        following = rows[layer][taken + 1 : taken + 2]
        if following:
            heapq.heapreplace(heap, (-following[0], layer, taken + 1))
        else:
            heapq.heappop(heap)
    return np.array(counts)


def run_case(tokens: int, problem: str, repeats: int) -> list[dict[str, Any]]:
    """Time all solvers in turn, so that a busy moment of the machine meets all of them."""
    gains = make_gains(tokens)
    solvers: dict[str, Solver] = {"farkv": solve_level, "full sort": solve_sort}
    if tokens <= 8192:
        solvers["heap greedy"] = solve_heap
    times: dict[str, list[float]] = {name: [] for name in solvers}
    found: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, solve in solvers.items():
            start = time.perf_counter()
            found[name] = solve(gains, problem)
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, spent in times.items():
        median = statistics.median(spent)
        rows.append(
            {
                "problem": problem,
                "layers": LAYERS,
                "tokens": tokens,
                "solver": name,
                "median_s": median,
                "least_s": min(spent),
                "repeats": repeats,
                "of_farkv": median / statistics.median(times["farkv"]),
                "kept_tokens": int(found[name].sum()),
                "retention": measure_retention(gains, found[name]),
                "differs_by": int(np.abs(found[name] - found["farkv"]).sum()),
            }
        )
    return rows


def main() -> None:
    """Parse the command line and run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/allocate.jsonl")
    parser.add_argument("--repeats", default=9, type=int)
    args = parser.parse_args()
    rows = [row for n in (8192, 131072) for problem in PROBLEMS for row in run_case(n, problem, args.repeats)]
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(format_table(Path(args.out)))


def format_table(path: Path) -> str:
    """Return one Markdown row per problem, length and solver."""
    lines = [
        "| problem | layers × tokens | solver | median | of farkv's | tokens that differ |",
        "|---|---|---|---|---|---|",
    ]
    for row in map(json.loads, path.read_text().splitlines()):
        size = f"{row['layers']} × {row['tokens']:,}"
        lines.append(
            f"| {row['problem']} | {size} | {row['solver']} | {1000 * row['median_s']:,.1f} ms "
            f"| {row['of_farkv']:.1f} × | {row['differs_by']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
