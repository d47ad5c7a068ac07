"""Time several methods in one run, round by round, so that what else the machine does meets all of them alike.

In: runners. Out: seconds per layer and token of every round, their median and spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple, Protocol, runtime_checkable

import torch

# A round of a quick method is made about this long by several tokens, of a slow one it is left out now and then.
ROUND_S = 0.1
MOST_TOKENS = 16
SLOW_ROUND_S = 0.25
LEAST_ROUNDS = 3


@runtime_checkable
class Runner(Protocol):
    """One method over a filled cache."""

    name: str
    # Layers it holds; they are visited in turn, so that no cache of the processor holds them.
    n_layers: int
    # Tokens of one round at least.
    least_tokens: int

    def step(self, layer: int) -> None:
        """Append one token's record to a layer and attend: what is timed."""
        ...

    def restore(self) -> None:
        """Undo what a round changed: not timed."""
        ...


class Spread(NamedTuple):
    """Seconds: median, quartiles and least of the rounds."""

    median_s: float
    low_s: float
    high_s: float
    least_s: float
    rounds: int


def summarize(seconds: Sequence[float]) -> Spread:
    """Return median and 25th and 75th percentile."""
    quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return Spread(median(seconds), float(quartiles[0]), float(quartiles[1]), min(seconds), len(seconds))


def divide(spread: Spread, n: int) -> Spread:
    """Return the spread of an `n`-th of what was timed."""
    return Spread(spread.median_s / n, spread.low_s / n, spread.high_s / n, spread.least_s / n, spread.rounds)


def run_round(runner: Runner, tokens: int) -> float:
    """Return the seconds per layer and token of one round."""
    start = time.perf_counter()
    for _ in range(tokens):
        for layer in range(runner.n_layers):
            runner.step(layer)
    seconds = time.perf_counter() - start
    runner.restore()
    return seconds / (tokens * runner.n_layers)


def measure_interleaved(
    runners: Sequence[Runner],
    rounds: int,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return seconds per layer and token of every round by method name; each method's first round is not counted.

    A method whose round takes longer than SLOW_ROUND_S takes part in fewer rounds, spread over the run.

    Args:
        advance: told after every round of one method.
    """
    tokens, every = {}, {}
    for runner in runners:
        first = run_round(runner, 1) * runner.n_layers
        if first < SLOW_ROUND_S:
            # Once more: the first pass over fresh memory pays for its pages.
            first = min(first, run_round(runner, 1) * runner.n_layers)
        tokens[runner.name] = max(runner.least_tokens, min(MOST_TOKENS, int(ROUND_S / first)))
        least = max(1, rounds // LEAST_ROUNDS)
        every[runner.name] = 1 + min(least - 1, int(first * tokens[runner.name] / SLOW_ROUND_S))
        advance()
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for i in range(rounds):
        # Another one begins each time: none always runs behind the same neighbour.
        for runner in (*runners[i % len(runners) :], *runners[: i % len(runners)]):
            if i % every[runner.name] == 0:
                seconds[runner.name].append(run_round(runner, tokens[runner.name]))
            advance()
    return seconds
