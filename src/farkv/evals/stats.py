"""How sure a mean is: percentile bootstrap, over samples inside cells, paired where two methods saw the same samples.

In: scores of samples. Out: means with intervals. A cell is one task at one length. Every cell weighs the same,
however many samples it has, so no task hides another; samples are drawn anew inside each cell, never across cells.
All draws come from a seed: the same scores give the same interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
DRAWS = 2000
# Numbers of one block of draws: 32 MB, whatever the number of samples.
MOST_DRAWN = 4_000_000

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, what 95 % of the bootstrap's means lie between, and the number of samples."""

    mean: float
    low: float
    high: float
    n: int = 0

    @property
    def has_zero(self) -> bool:
        """Return whether a difference of nothing is inside."""
        return self.low <= 0.0 <= self.high


class Paired(NamedTuple):
    """The mean of a_i - b_i with its interval, and how many samples a won, tied and lost."""

    delta: Interval
    wins: int
    ties: int
    losses: int


def draw_means(values: ArrayLike, seed: Sequence[int] | int = 0, draws: int = DRAWS) -> Floats:
    """Return the means of `draws` resamples of one cell: means[d, m] = sum_i count[d, i] values[i, m] / n.

    All columns share the resamples, so a difference of two columns is a paired one.

    Args:
        values: `[n, m]`, one row per sample, one column per method.
        seed: of the resamples; other cells need other seeds, or their means go up and down together.
        draws: how many resamples.

    Returns:
        `[draws, m]`, float64.

    Cost: draws * n random numbers and one matrix product, in blocks of 32 MB.
    """
    table = np.asarray(values, dtype=np.float64)
    n = len(table)
    rng = np.random.default_rng(seed)
    block = max(1, min(draws, MOST_DRAWN // max(n, 1)))
    # The means of deviations: equal values give exactly their own mean, not one that sums have rounded.
    centre = table[0]
    means = np.empty((draws, table.shape[1]))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        chosen = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = centre + counts @ (table - centre) / n
    return means


def column_means(table: Floats) -> Floats:
    """Return the mean of each column, exact where all its values are equal.

    Args:
        table: `[n, m]`.
    """
    return table[0] + (table - table[0]).mean(axis=0)


def interval(mean: float, drawn: ArrayLike, n: int) -> Interval:
    """Return a mean with the percentile interval of its bootstrap means; it contains the mean."""
    low, high = np.quantile(np.asarray(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)


def bootstrap(values: ArrayLike, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the mean of one cell's values with its interval.

    One value, or equal values, give an interval of no width: n says how little that proves.

    Args:
        values: `[n]`, at least one.
        seed: of the resamples.
        draws: how many resamples.
    """
    return bootstrap_cells([np.asarray(values, dtype=np.float64)], seed, draws)


def bootstrap_cells(cells: Sequence[ArrayLike], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the mean of cell means, mean_c mean_i values[c][i], with its interval.

    Args:
        cells: one `[n_c]` per cell, each with at least one value.
        seed: of the resamples.
        draws: how many resamples per cell.
    """
    columns = [np.asarray(cell, dtype=np.float64)[:, None] for cell in cells]
    mean = float(np.mean([column_means(column)[0] for column in columns]))
    drawn = np.mean([draw_means(column, [seed, i], draws) for i, column in enumerate(columns)], axis=0)
    return interval(mean, drawn, sum(len(column) for column in columns))


def paired(
    a: Mapping[tuple[Hashable, ...], float],
    b: Mapping[tuple[Hashable, ...], float],
    seed: int = 0,
    draws: int = DRAWS,
) -> Paired:
    """Return the mean of a_i - b_i over the samples that both have, with its interval and the count of wins.

    Args:
        a: score of each sample, by (task, length, seed); all but the last part name the cell.
        b: the same for what it is compared with.
        seed: of the resamples.
        draws: how many resamples per cell.

    Raises:
        ValueError: no sample is in both.
    """
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(f"no sample is in both: {len(a)} and {len(b)} samples; compare runs of the same prompts")
    cells: dict[tuple[Hashable, ...], list[float]] = {}
    for key in shared:
        cells.setdefault(key[:-1], []).append(a[key] - b[key])
    every = np.concatenate([np.asarray(cell) for cell in cells.values()])
    won, lost = int((every > 0).sum()), int((every < 0).sum())
    return Paired(bootstrap_cells(list(cells.values()), seed, draws), won, len(every) - won - lost, lost)
