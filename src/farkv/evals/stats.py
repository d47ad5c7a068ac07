"""Confidence intervals of means: percentile bootstrap over the samples of a cell (one task at one length).

In: scores of samples. Out: means with intervals. All methods of a cell use the same resamples, so differences are
paired. Samples are resampled within their cell and cells have equal weights, so that no task dominates. All draws are
seeded: the same scores give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL, DRAWS = 0.95, 2000
# Numbers per block of draws: 32 MB, independent of the number of samples.
MOST_DRAWN = 4_000_000

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, the ends of its 95 % interval, and the number of samples."""

    mean: float
    low: float
    high: float
    n: int = 0


class Paired(NamedTuple):
    """The mean of a_i - b_i with its interval, and the number of samples that a won, tied and lost."""

    delta: Interval
    wins: int
    ties: int
    losses: int


def draw_means(values: ArrayLike, seed: Sequence[int] | int = 0, draws: int = DRAWS) -> Floats:
    """Return the means of `draws` resamples of one cell: means[d, m] = sum_i count[d, i] values[i, m] / n.

    Args:
        values: `[n, m]`, one row per sample, one column per method.
        seed: of the resamples; it must differ between cells, or their means would be correlated.
        draws: number of resamples.

    Returns:
        float64 `[draws, m]`.

    Cost: draws * n random numbers and one matrix product, in blocks of 32 MB.
    """
    table = np.asarray(values, dtype=np.float64)
    n = len(table)
    rng = np.random.default_rng(seed)
    block = max(1, min(draws, MOST_DRAWN // max(n, 1)))
    # Means of deviations from the first row: equal values give their mean exactly, without rounding errors.
    centre = table[0]
    means = np.empty((draws, table.shape[1]))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        chosen = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = centre + counts @ (table - centre) / n
    return means


def column_means(table: Floats) -> Floats:
    """Return the mean of each column of `[n, m]`, exact if all its values are equal."""
    return table[0] + (table - table[0]).mean(axis=0)


def interval(mean: float, drawn: ArrayLike, n: int) -> Interval:
    """Return a mean of n samples with the percentile interval of its bootstrap means, widened to contain the mean.

    A single sample, or equal samples, give an interval of zero width; judge it by n.
    """
    low, high = np.quantile(np.asarray(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)
