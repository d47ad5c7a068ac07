"""The exact solvers: against every choice tried, and against HiGHS."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from farkv.errors import ConfigError
from farkv.per_prompt import knapsack
from farkv.per_prompt.knapsack import choose_cheapest, choose_levels, fill_level


def draw(seed: int, units: int, levels: int, whole: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Return values, costs and a budget that fits; whole values have many ties and sum exactly."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 4, (units, levels)).astype(float) if whole else rng.normal(size=(units, levels))
    values[rng.random((units, levels)) < 0.2] = rng.choice([-np.inf, np.inf, np.nan])
    values[:, rng.integers(levels)] = 0.0
    costs = rng.integers(0, 9, (units, levels)) * int(rng.integers(1, 4))
    least = np.where(np.isfinite(values), costs, 10**6).min(1).sum()
    return values, costs, int(least + rng.integers(0, 20))


def try_all(values: np.ndarray, costs: np.ndarray, budget: int) -> tuple[int, ...]:
    """Return the best choice; of equal ones the cheapest, then the first in lexical order."""
    rows = np.arange(len(values))
    fits = [
        ks
        for ks in itertools.product(range(values.shape[1]), repeat=len(values))
        if np.isfinite(values[rows, list(ks)]).all() and costs[rows, list(ks)].sum() <= budget
    ]
    return min(fits, key=lambda ks: (-values[rows, list(ks)].sum(), costs[rows, list(ks)].sum(), ks))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_it_is_the_best_of_all_choices_and_ties_are_defined(seed: int, units: int, levels: int) -> None:
    values, costs, budget = draw(seed, units, levels, whole=True)
    before = values.copy()
    assert tuple(choose_levels(values, costs, budget)) == try_all(values, costs, budget)
    assert np.array_equal(values, before, equal_nan=True), "the caller's array is his"


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 10))
def test_it_is_what_highs_finds(seed: int, units: int, levels: int) -> None:
    values, costs, budget = draw(seed, units, levels, whole=False)
    usable = np.isfinite(values)
    one_each = np.kron(np.eye(units), np.ones(levels))
    solved = milp(
        -np.where(usable, values, 0).ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.reshape(1, -1), ub=budget),
            LinearConstraint((~usable).reshape(1, -1).astype(float), 0, 0),
        ],
        options={"mip_rel_gap": 0},
    )
    chosen = choose_levels(values, costs, budget)
    rows = np.arange(units)
    assert costs[rows, chosen].sum() <= budget
    assert values[rows, chosen].sum() == pytest.approx(-solved.fun, abs=1e-7)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_the_cheapest_choice_that_reaches_a_target(seed: int, units: int, levels: int) -> None:
    values, costs, _ = draw(seed, units, levels, whole=True)
    rows = np.arange(units)
    best = values[rows, choose_levels(values, costs, int(costs.sum()))].sum()
    target = best - seed % 3
    chosen = choose_cheapest(values, costs, target, lambda ks: values[rows, ks].sum() >= target)
    cost = int(costs[rows, chosen].sum())
    assert values[rows, chosen].sum() >= target
    dearer = np.where(np.isfinite(values), costs, 10**6).min(1).sum() > cost - 1
    assert dearer or values[rows, list(try_all(values, costs, cost - 1))].sum() < target
    with pytest.raises(ConfigError, match="no choice of levels reaches"):
        choose_cheapest(values, costs, best + 1, lambda _: True)


def test_greedy_is_not_enough_where_gains_rise() -> None:
    values = np.array([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    costs = np.array([[0, 1, 2]] * 2)
    assert choose_levels(values, costs, 2).tolist() == [0, 2], "a marginal greedy takes 0.5 first and stops at 0.5"


def test_only_ratios_of_costs_matter() -> None:
    values, costs, budget = draw(3, 4, 5, whole=True)
    scaled = choose_levels(values, costs * 10**9, budget * 10**9 + 5)
    assert scaled.tolist() == choose_levels(values, costs, budget).tolist()
    assert choose_levels(values, costs * 0, 0).tolist() == np.where(np.isfinite(values), values, -9).argmax(1).tolist()


def test_many_levels_in_one_unit() -> None:
    n = 40_000
    assert choose_levels(np.arange(n)[None].astype(float), np.arange(n)[None], n - 2).tolist() == [n - 2]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6))
def test_ties_go_one_by_one_to_the_smallest(pairs: list[tuple[int, int]]) -> None:
    few = np.array([a for a, _ in pairs])
    many = few + np.array([b for _, b in pairs])
    now = few.copy()
    for budget in range(int(few.sum()), int(many.sum()) + 1):
        assert fill_level(few, many, budget).tolist() == now.tolist()
        room = np.flatnonzero(now < many)
        if len(room):
            now[room[now[room].argmin()]] += 1


ONE = np.ones((1, 1))


@pytest.mark.parametrize(
    ("values", "costs", "budget", "says"),
    [
        (np.ones(3), np.ones(3, int), 1, "one shape"),
        (np.ones((1, 2)), np.ones((2, 1), int), 1, "one shape"),
        (np.ones((0, 2)), np.ones((0, 2), int), 1, "one shape"),
        (ONE, ONE, 1, "whole numbers"),
        (ONE, -ONE.astype(int), 1, "whole numbers"),
        (ONE, ONE.astype(int), -1, "no level"),
        (ONE, 2 * ONE.astype(int), 1, "no level"),
        (np.full((1, 2), np.nan), np.ones((1, 2), int), 1, "no level"),
        (np.ones((2, 1)), np.ones((2, 1), int), 1, "together cost more"),
    ],
)
def test_what_cannot_be_chosen_is_refused(values: np.ndarray, costs: np.ndarray, budget: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_levels(values, costs, budget)


@pytest.mark.parametrize(("limit", "at"), [("MAX_CELLS", 9), ("MAX_CANDIDATES", 29)])
def test_a_table_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, at: int) -> None:
    monkeypatch.setattr(knapsack, limit, at)
    with pytest.raises(ConfigError, match="use a larger unit"):
        choose_levels(np.ones((2, 3)), np.array([[0, 1, 2]] * 2), 4)
    monkeypatch.setattr(knapsack, limit, at + 1)
    choose_levels(np.ones((2, 3)), np.array([[0, 1, 2]] * 2), 4)
