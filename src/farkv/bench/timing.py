"""Time several methods in one run, interleaved round by round, so that other load affects all of them equally.

In: runners. Out: seconds per layer and token of every round, their median and spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple, Protocol, runtime_checkable

import torch

# Target length of a round: a fast method runs several tokens per round, a slow one skips some rounds.
ROUND_S = 0.1
MOST_TOKENS = 16
SLOW_ROUND_S = 0.25
LEAST_ROUNDS = 3


@runtime_checkable
class Runner(Protocol):
    """One method over a filled cache."""

    name: str
    # Number of layers; a round visits all of them in turn, so that none stays in a processor cache.
    n_layers: int
    # Minimum number of tokens per round.
    least_tokens: int

    def step(self, layer: int) -> None:
        """Append one token's record to a layer and attend; this is timed."""
        ...

    def restore(self) -> None:
        """Undo the changes of a round; not timed."""
        ...


class Spread(NamedTuple):
    """Seconds: median, quartiles and minimum over the rounds."""

    median_s: float
    low_s: float
    high_s: float
    least_s: float
    rounds: int


def summarize(seconds: Sequence[float]) -> Spread:
    """Return median, quartiles and minimum."""
    quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return Spread(median(seconds), float(quartiles[0]), float(quartiles[1]), min(seconds), len(seconds))


def divide(spread: Spread, n: int) -> Spread:
    """Return the spread divided by `n`."""
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
    """Return every round's seconds per layer and token, by method name; each method's warm-up round is not counted.

    A method whose round takes longer than SLOW_ROUND_S runs fewer rounds, spread over the run.

    Args:
        advance: called after every round of one method.
    """
    tokens, every = {}, {}
    for runner in runners:
        first = run_round(runner, 1) * runner.n_layers
        if first < SLOW_ROUND_S:
            # Run once more: the first pass over fresh memory causes page faults.
            first = min(first, run_round(runner, 1) * runner.n_layers)
        tokens[runner.name] = max(runner.least_tokens, min(MOST_TOKENS, int(ROUND_S / first)))
        least = max(1, rounds // LEAST_ROUNDS)
        every[runner.name] = 1 + min(least - 1, int(first * tokens[runner.name] / SLOW_ROUND_S))
        advance()
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for i in range(rounds):
        # The order rotates, so that no method always runs first.
        for runner in (*runners[i % len(runners) :], *runners[: i % len(runners)]):
            if i % every[runner.name] == 0:
                seconds[runner.name].append(run_round(runner, tokens[runner.name]))
            advance()
    return seconds
