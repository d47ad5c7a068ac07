"""The exact solvers, and the rule that is made of them: against every choice tried, and against HiGHS."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from farkv.errors import ConfigError
from farkv.math import knapsack
from farkv.math.allocate import allocate, measure_layer_retention, measure_retention
from farkv.math.knapsack import choose_cheapest, choose_levels, fill_level

seeds = st.integers(0, 10**6)


def draw(seed: int, layers: int, tokens: int, tied: bool = False, rising: bool = False) -> np.ndarray:
    """Return gains [L, N]. Tied ones are small whole numbers in rows that sum to 64: all arithmetic is exact."""
    rng = np.random.default_rng(seed)
    if tied:
        gains = rng.multinomial(64, rng.dirichlet(np.ones(tokens)), layers).astype(float)
        gains[rng.random(layers) < 0.1] = 0
    else:
        gains = rng.random((layers, tokens)) ** rng.integers(1, 6, (layers, 1))
    return gains if rising else -np.sort(-gains, 1)


def draw_box(seed: int, layers: int, tokens: int, unit: int) -> dict[str, Any]:
    """Return floor and cap that leave room in pages."""
    rng = np.random.default_rng(seed + 1)
    n_pages = -(-tokens // unit)
    low = rng.integers(0, n_pages // 2 + 1, layers)
    high = np.maximum(low, rng.integers(0, n_pages + 2, layers))
    floor = np.maximum(low * unit - rng.integers(0, unit, layers), 0)
    return {"floor": floor, "cap": high * unit + rng.integers(0, unit, layers), "unit": unit}


def count_pages(tokens: np.ndarray, unit: int) -> np.ndarray:
    return -(-tokens // unit)


def list_all(
    gains: np.ndarray, floor: Any = 0, cap: Any = None, unit: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pages [M, L], tokens [M, L] and layer retention [M, L] of all allocations in the box."""
    layers, tokens = gains.shape
    most = -(-tokens // unit)
    low = np.broadcast_to(-(-np.asarray(floor) // unit), layers)
    high = np.broadcast_to(most if cap is None else np.minimum(np.asarray(cap) // unit, most), layers)
    pages = np.array(list(itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))))
    counts = np.minimum(pages * unit, tokens)
    kept = np.stack([measure_layer_retention(gains, n) for n in range(tokens + 1)])
    return pages, counts, kept[counts, np.arange(layers)]


def try_all(gains: np.ndarray, weights: Any = None, **box: Any) -> dict[int, float]:
    """Return the best weighted retention of every number of pages, over all allocations in the box."""
    weight = np.ones(len(gains)) if weights is None else np.asarray(weights)
    pages, _, kept = list_all(gains, **box)
    totals, means = pages.sum(1), (kept * weight).sum(1) / weight.sum()
    return {int(n): float(means[totals == n].max()) for n in np.unique(totals)}


def draw_levels(seed: int, units: int, levels: int, whole: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Return values, costs and a budget that fits; whole values have many ties and sum exactly."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 4, (units, levels)).astype(float) if whole else rng.normal(size=(units, levels))
    values[rng.random((units, levels)) < 0.2] = rng.choice([-np.inf, np.inf, np.nan])
    values[:, rng.integers(levels)] = 0.0
    costs = rng.integers(0, 9, (units, levels)) * int(rng.integers(1, 4))
    least = np.where(np.isfinite(values), costs, 10**6).min(1).sum()
    return values, costs, int(least + rng.integers(0, 20))


def try_levels(values: np.ndarray, costs: np.ndarray, budget: int) -> tuple[int, ...]:
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
    values, costs, budget = draw_levels(seed, units, levels, whole=True)
    before = values.copy()
    assert tuple(choose_levels(values, costs, budget)) == try_levels(values, costs, budget)
    assert np.array_equal(values, before, equal_nan=True), "the caller's array is his"


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 10))
def test_it_is_what_highs_finds(seed: int, units: int, levels: int) -> None:
    values, costs, budget = draw_levels(seed, units, levels, whole=False)
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
    values, costs, _ = draw_levels(seed, units, levels, whole=True)
    rows = np.arange(units)
    best = values[rows, choose_levels(values, costs, int(costs.sum()))].sum()
    target = best - seed % 3
    chosen = choose_cheapest(values, costs, target, lambda ks: values[rows, ks].sum() >= target)
    cost = int(costs[rows, chosen].sum())
    assert values[rows, chosen].sum() >= target
    dearer = np.where(np.isfinite(values), costs, 10**6).min(1).sum() > cost - 1
    assert dearer or values[rows, list(try_levels(values, costs, cost - 1))].sum() < target
    with pytest.raises(ConfigError, match="no choice of levels reaches"):
        choose_cheapest(values, costs, best + 1, lambda _: True)


def test_greedy_is_not_enough_where_gains_rise() -> None:
    values = np.array([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    costs = np.array([[0, 1, 2]] * 2)
    assert choose_levels(values, costs, 2).tolist() == [0, 2], "a marginal greedy takes 0.5 first and stops at 0.5"


def test_only_ratios_of_costs_matter() -> None:
    values, costs, budget = draw_levels(3, 4, 5, whole=True)
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


@given(seeds, st.integers(2, 3), st.integers(1, 6), st.integers(1, 2), st.integers(0, 60))
def test_unequal_bytes_are_spent_as_if_all_were_tried(
    seed: int, layers: int, tokens: int, unit: int, more: int
) -> None:
    gains, box = draw(seed, layers, tokens), draw_box(seed, layers, tokens, unit)
    sizes = np.array([2, 3, 6][:layers]) * 128
    pages, _, kept = list_all(gains, **box)
    spent = (pages * unit * sizes).sum(1)
    n_bytes = int(spent.min()) + more * 100
    for rule in ("xkv", "knapsack"):
        got = allocate(gains, n_bytes=n_bytes, token_bytes=sizes, rule=rule, **box)
        assert (count_pages(got, unit) * unit * sizes).sum() <= n_bytes
        best = kept.mean(1)[spent <= n_bytes].max()
        assert measure_retention(gains, got) == pytest.approx(best, abs=1e-12)


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_gains_in_any_order_are_solved_as_if_all_were_tried(
    seed: int, layers: int, tokens: int, unit: int, tied: bool
) -> None:
    gains, box = draw(seed, layers, tokens, tied, rising=True), draw_box(seed, layers, tokens, unit)
    best = try_all(gains, **box)
    for pages in best:
        got = allocate(gains, tokens=pages * unit, rule="knapsack", **box)
        assert count_pages(got, unit).sum() == pages
        assert measure_retention(gains, got) == pytest.approx(max(r for n, r in best.items() if n <= pages), abs=1e-12)
    rho = max(best.values()) * (1 - (seed % 10) / 10)
    if rho > 0:
        got = allocate(gains, retention=rho, rule="knapsack", **box)
        assert measure_retention(gains, got) >= rho
        assert count_pages(got, unit).sum() == min(n for n, r in best.items() if r >= rho)


def test_the_rule_finds_what_greedy_does_not() -> None:
    gains = np.array([[0.5, 0.5], [0.0, 1.0]])
    assert measure_retention(gains, allocate(gains, tokens=2, rule="knapsack")) == 0.5
    assert allocate(gains, tokens=2, rule="knapsack", weights=[1, 2]).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="knapsack"):
        allocate(gains, tokens=2)
