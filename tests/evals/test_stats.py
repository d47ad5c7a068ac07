"""Intervals: known coverage, exact shifts, cells of one weight, the same numbers for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import ArrayLike

from farkv.evals.stats import DRAWS, Interval, column_means, draw_means, interval


def bootstrap(*cells: ArrayLike, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the mean of cell means with its interval, as tables make it of a method's cells."""
    columns = [np.asarray(cell, dtype=np.float64)[:, None] for cell in cells]
    mean = float(np.mean([column_means(column) for column in columns]))
    drawn = np.mean([draw_means(column, [seed, i], draws) for i, column in enumerate(columns)], axis=0)
    return interval(mean, drawn, sum(map(len, columns)))


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        found = bootstrap(rng.normal(0.4, 0.2, size=60), seed=trial, draws=400)
        hits += found.low <= 0.4 <= found.high
    # 95 % of 200 trials is 190, with a standard deviation of three; 60 samples lose about one point.
    assert 178 <= hits <= 199


def test_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(0.0, 1.0, size=400)
    found = bootstrap(values)
    assert found.n == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_interval_is_scipys():
    values = np.random.default_rng(4).beta(2, 1, size=80)
    other = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    found = bootstrap(values, draws=20_000)
    assert found[1:3] == pytest.approx(tuple(other.confidence_interval), abs=0.002)


@pytest.mark.parametrize("values", [[0.3], [0.1] * 7, [1.0] * 20, [0.0]])
def test_equal_values_give_their_own_mean_and_no_width(values: list[float]):
    assert bootstrap(values) == Interval(values[0], values[0], values[0], len(values))


def test_same_seed_same_interval_and_other_seed_another():
    values = np.random.default_rng(1).random(30)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_every_cell_weighs_the_same():
    found = bootstrap([1.0] * 99, [0.0])
    assert found.mean == 0.5
    assert found.n == 100


def test_samples_are_drawn_inside_their_cells():
    # Two cells without any spread: nothing that is drawn can move the mean, though the samples differ.
    assert bootstrap([1.0] * 5, [0.0] * 5) == Interval(0.5, 0.5, 0.5, 10)


def test_cells_of_one_size_are_drawn_independently():
    cell = np.random.default_rng(2).random(50)
    one = bootstrap(cell)
    two = bootstrap(cell, cell)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(2**-0.5, rel=0.1)


def test_blocks_change_no_draw_of_the_mean(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).random((50, 2))
    whole = draw_means(values, 7, 300)
    monkeypatch.setattr("farkv.evals.stats.MOST_DRAWN", 50 * 64)
    np.testing.assert_allclose(draw_means(values, 7, 300), whole)


def test_columns_share_their_resamples():
    values = np.random.default_rng(3).random((50, 1))
    drawn = draw_means(np.hstack([values, values + 0.25]), 7, 300)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 0.25)
