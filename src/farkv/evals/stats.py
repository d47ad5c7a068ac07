"""How sure a mean is: percentile bootstrap over the samples of a cell, one task at one length.

In: scores of samples. Out: means with intervals. All methods of a cell share the resamples, so the difference of two is
paired. Samples are resampled inside their cell and every cell weighs the same, so no task hides another. All draws come
from a seed: the same scores give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL, DRAWS = 0.95, 2000
# Numbers in one block of draws: 32 MB, whatever the number of samples.
MOST_DRAWN = 4_000_000

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, the ends of its 95 % interval, and the number of samples."""

    mean: float
    low: float
    high: float
    n: int = 0


class Paired(NamedTuple):
    """The mean of a_i - b_i with its interval, and how many samples a won, tied and lost."""

    delta: Interval
    wins: int
    ties: int
    losses: int


def draw_means(values: ArrayLike, seed: Sequence[int] | int = 0, draws: int = DRAWS) -> Floats:
    """Return the means of `draws` resamples of one cell: means[d, m] = sum_i count[d, i] values[i, m] / n.

    Args:
        values: `[n, m]`, one row per sample, one column per method.
        seed: of the resamples; each cell needs its own, otherwise the means of cells are correlated.
        draws: how many resamples.

    Returns:
        `[draws, m]`, float64.

    Cost: draws * n random numbers and one matrix product, in blocks of 32 MB.
    """
    table = np.asarray(values, dtype=np.float64)
    n = len(table)
    rng = np.random.default_rng(seed)
    block = max(1, min(draws, MOST_DRAWN // max(n, 1)))
    # Means of deviations: equal values give exactly their own mean, without a rounding error.
    centre = table[0]
    means = np.empty((draws, table.shape[1]))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        chosen = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = centre + counts @ (table - centre) / n
    return means


def column_means(table: Floats) -> Floats:
    """Return the mean of each column of `[n, m]`, exact where all its values are equal."""
    return table[0] + (table - table[0]).mean(axis=0)


def interval(mean: float, drawn: ArrayLike, n: int) -> Interval:
    """Return a mean of n samples with the percentile interval of its bootstrap means, widened to contain the mean.

    One sample, or equal ones, give an interval of no width: n says how little that proves.
    """
    low, high = np.quantile(np.asarray(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)
