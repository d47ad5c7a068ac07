"""Intervals: known coverage, exact shifts, cells of one weight, the same numbers for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from farkv.evals.stats import Interval, bootstrap, bootstrap_cells, draw_means, paired


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


@pytest.mark.parametrize("values", [[0.3], [0.1] * 7, [1.0] * 20, [0.0]])
def test_equal_values_give_their_own_mean_and_no_width(values: list[float]):
    assert bootstrap(values) == Interval(values[0], values[0], values[0], len(values))


def test_same_seed_same_interval_and_other_seed_another():
    values = np.random.default_rng(1).random(30)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_every_cell_weighs_the_same():
    found = bootstrap_cells([[1.0] * 99, [0.0]])
    assert found.mean == 0.5
    assert found.n == 100


def test_samples_are_drawn_inside_their_cells():
    # Two cells without any spread: nothing that is drawn can move the mean, though the samples differ.
    assert bootstrap_cells([[1.0] * 5, [0.0] * 5]) == Interval(0.5, 0.5, 0.5, 10)


def test_cells_of_one_size_are_drawn_independently():
    cell = np.random.default_rng(2).random(50)
    one = bootstrap(cell)
    two = bootstrap_cells([cell, cell])
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


def scores(values: list[float], task: str = "vt", length: int = 2048) -> dict[tuple[str, int, int], float]:
    return {(task, length, seed): value for seed, value in enumerate(values)}


def test_paired_finds_a_constant_shift_exactly():
    base = list(np.random.default_rng(0).integers(0, 64, size=40) / 128)
    found = paired(scores([x + 0.25 for x in base]), scores(base))
    assert found.delta == Interval(0.25, 0.25, 0.25, 40)
    assert (found.wins, found.ties, found.losses) == (40, 0, 0)


def test_paired_counts_and_takes_what_both_have():
    a = scores([1.0, 0.5, 0.0, 1.0])
    b = scores([0.0, 0.5, 1.0])
    found = paired(a, b)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert found.delta.n == 3
    assert found.delta.mean == 0.0
    assert found.delta.has_zero


def test_paired_averages_over_cells():
    a = scores([1.0] * 9) | scores([0.0], task="cwe")
    b = scores([0.0] * 9) | scores([0.0], task="cwe")
    assert paired(a, b).delta.mean == 0.5


def test_paired_refuses_samples_that_do_not_meet():
    with pytest.raises(ValueError, match="no sample is in both"):
        paired(scores([1.0]), scores([1.0], task="cwe"))
