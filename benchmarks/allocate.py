"""How long does an allocation take? The water level against a sort of all gains and a greedy on a heap.

    python benchmarks/allocate.py

In: power-law gain curves of 32 layers, float32. Out: a JSON line per problem, length and solver: the median time on
one core, validation included where the solver validates, and its ratio to farkv's. All must agree on the answer.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rows import RESULTS, Rows, format_rows, read_rows
from runs import Recorder, make_parser, time_call

from farkv import allocate
from farkv.math.allocate import measure_retention

LAYERS, RATIO, RETENTION = 32, 0.2, 0.9
PROBLEMS: dict[str, dict[str, Any]] = {"P1": {"ratio": RATIO}, "P2": {"retention": RETENTION}}


def make_gains(tokens: int, seed: int = 0) -> np.ndarray:
    """Return curves [LAYERS, tokens] whose layers differ as those of models do: decay exponents 0.5 to 1.5."""
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.5, 1.5, (LAYERS, 1))
    return (np.arange(1, tokens + 1) ** -decay * rng.uniform(0.5, 2, (LAYERS, 1))).astype(np.float32)


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


def run_case(tokens: int, problem: str, repeats: int) -> Rows:
    """Time all solvers in turn, so that a busy moment of the machine meets all of them."""
    gains = make_gains(tokens)
    solvers: dict[str, Callable[[], np.ndarray]] = {
        "farkv": lambda: allocate(gains, **PROBLEMS[problem]),
        "full sort": lambda: solve_sort(gains, problem),
    }
    if tokens <= 8192:
        solvers["heap greedy"] = lambda: solve_heap(gains, problem)
    times: dict[str, list[float]] = {name: [] for name in solvers}
    found: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, solve in solvers.items():
            seconds, found[name] = time_call(solve)
            times[name].append(seconds)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    return [
        dict(problem=problem, layers=LAYERS, tokens=tokens, solver=name, median_s=medians[name], least_s=min(spent),
             repeats=repeats, of_farkv=medians[name] / medians["farkv"], kept_tokens=int(found[name].sum()),
             retention=measure_retention(gains, found[name]),
             differs_by=int(np.abs(found[name] - found["farkv"]).sum()))
        for name, spent in times.items()
    ]  # fmt: skip


def format_table(path: Path = RESULTS / "allocate.jsonl") -> str:
    """Return one Markdown row per problem, length and solver."""
    return format_rows(
        ["problem", "layers × tokens", "solver", "median", "of farkv's", "tokens that differ"],
        ([r["problem"], f"{r['layers']} × {r['tokens']:,}", r["solver"], f"{1000 * r['median_s']:,.1f} ms",
          f"{r['of_farkv']:.1f} ×", r["differs_by"]] for r in read_rows(path)),
    )  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "allocate.jsonl")
    parser.add_argument("--repeats", default=9, type=int)
    run = Recorder(parser)
    for tokens in (8192, 131072):
        for problem in PROBLEMS:
            run.write(*run_case(tokens, problem, run.args.repeats))
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
