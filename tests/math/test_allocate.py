"""The allocator: against every allocation tried, a sort of all gains, and what each rule is by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farkv.errors import ConfigError
from farkv.math.allocate import BETA, RULES, allocate, measure_layer_retention, measure_retention
from tests.math.test_knapsack import count_pages, draw, draw_box, list_all, try_all

seeds = st.integers(0, 10**6)


def sort_all(gains: np.ndarray, tokens: int) -> np.ndarray:
    """Return the counts per layer of the largest gains of all."""
    shares = gains / gains.sum(1, dtype=float, keepdims=True)
    order = np.argsort(-shares.ravel(), kind="stable")[:tokens]
    return np.bincount(order // gains.shape[1], minlength=len(gains))


@pytest.mark.parametrize("tied", [False, True])
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_both_problems_are_solved_as_if_all_were_tried(
    tied: bool, seed: int, layers: int, tokens: int, unit: int, boxed: bool
) -> None:
    gains = draw(seed, layers, tokens, tied)
    weights = None if seed % 2 else 2.0 ** np.random.default_rng(seed).integers(-2, 3, layers)
    box: dict[str, Any] = draw_box(seed, layers, tokens, unit) if boxed else {"unit": unit}
    best = try_all(gains, weights=weights, **box)
    for pages, retention in list(best.items())[seed % 4 :: 4]:
        got = allocate(gains, tokens=pages * unit, weights=weights, **box)
        assert count_pages(got, unit).sum() == pages
        assert measure_retention(gains, got, weights) == pytest.approx(retention, abs=0 if tied else 1e-12)
        # Duality: the least pages for what these pages keep are these, or fewer that keep as much.
        wanted = measure_retention(gains, got, weights)
        if wanted > 0:
            back = allocate(gains, retention=wanted, weights=weights, **box)
            assert measure_retention(gains, back, weights) >= wanted
            if wanted < 1:
                assert count_pages(back, unit).sum() == min(n for n, r in best.items() if r >= wanted - 1e-15)
    full = max(best)
    assert count_pages(allocate(gains, tokens=10**9, weights=weights, **box), unit).sum() == full


@given(seeds, st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 1.0))
def test_no_smaller_allocation_reaches_the_retention(seed: int, layers: int, tokens: int, rho: float) -> None:
    gains = draw(seed, layers, tokens)
    got = allocate(gains, retention=rho)
    assert measure_retention(gains, got) >= rho
    assert got.sum() == min(n for n, r in try_all(gains).items() if r >= rho)


@given(seeds, st.integers(1, 40), st.integers(1, 200), st.floats(0, 1))
def test_it_is_the_full_sort(seed: int, layers: int, tokens: int, share: float) -> None:
    gains = draw(seed, layers, tokens)
    budget = int(share * gains.size)
    for dtype in (np.float32, np.float64):
        narrow = gains.astype(dtype)
        assert allocate(narrow, tokens=budget).tolist() == sort_all(narrow, budget).tolist()
    assert allocate(torch.from_numpy(gains), tokens=budget).tolist() == sort_all(gains, budget).tolist()


@pytest.mark.parametrize("rule", [r for r in RULES if r != "knapsack"])
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_a_larger_budget_takes_from_no_layer(
    rule: str, seed: int, layers: int, tokens: int, unit: int, tied: bool
) -> None:
    gains = draw(seed, layers, tokens, tied)
    box = draw_box(seed, layers, tokens, unit)
    floor = count_pages(box["floor"], unit).sum()
    most = np.minimum(box["cap"] // unit, count_pages(np.array(tokens), unit)).sum()
    before = allocate(gains, tokens=int(floor) * unit, rule=rule, **box)
    kept = measure_retention(gains, before)
    for pages in range(floor + 1, most + 1):
        now = allocate(gains, tokens=int(pages) * unit, rule=rule, **box)
        assert (now >= before).all()
        assert count_pages(now, unit).sum() == pages, "all of the budget is spent"
        assert measure_retention(gains, now) >= kept, "and rounding does not let retention fall"
        before, kept = now, measure_retention(gains, now)


@pytest.mark.parametrize("rule", ["pyramid", "uniform"])
@given(seeds, st.integers(1, 6), st.integers(1, 30), st.floats(0.05, 1.0))
def test_a_fixed_shape_reaches_retention_with_its_least_budget(
    rule: str, seed: int, layers: int, tokens: int, rho: float
) -> None:
    gains = draw(seed, layers, tokens)
    got = allocate(gains, retention=rho, rule=rule)
    assert measure_retention(gains, got) >= rho
    assert got.tolist() == allocate(gains, tokens=int(got.sum()), rule=rule).tolist()
    if got.sum():
        assert measure_retention(gains, allocate(gains, tokens=int(got.sum()) - 1, rule=rule)) < rho


@given(seeds, st.integers(2, 6), st.integers(3, 30))
def test_the_order_of_layers_does_not_matter(seed: int, layers: int, tokens: int) -> None:
    gains = draw(seed, layers, tokens)
    order = np.random.default_rng(seed).permutation(layers)
    budgets: list[dict[str, Any]] = [{"ratio": 0.4}, {"retention": 0.8}]
    for budget in budgets:
        assert allocate(gains[order], **budget).tolist() == allocate(gains, **budget)[order].tolist()


@pytest.mark.parametrize("rule", ["xkv", "maxmin", "uniform"])
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_equal_curves_share_equally(rule: str, seed: int, layers: int, tokens: int, flat: bool) -> None:
    one = np.ones((1, tokens)) if flat else draw(seed, 1, tokens)
    gains = np.repeat(one, layers, 0)
    for budget in range(seed % 4, layers * tokens + 1, 4):
        each, rest = divmod(budget, layers)
        want = [each + (layer < rest) for layer in range(layers)]
        assert allocate(gains, tokens=budget, rule=rule).tolist() == want


def test_millions_of_ties_take_no_longer_than_none() -> None:
    gains = np.ones((4, 500_000), np.float32)
    assert allocate(gains, tokens=1_000_003).tolist() == [250_001, 250_001, 250_001, 250_000]
    assert allocate(gains, retention=0.5).tolist() == [250_000] * 4
    gains[:2] = 0
    assert allocate(gains, tokens=1_500_000).tolist() == [250_000, 250_000, 500_000, 500_000]


@settings(max_examples=15)
@given(seeds, st.integers(1, 5), st.integers(1, 8), st.integers(1, 3))
def test_retention_one_keeps_every_positive_gain_and_no_other(seed: int, layers: int, tokens: int, unit: int) -> None:
    gains = draw(seed, layers, tokens)
    gains[gains < 0.05] = 0
    gains[:, -1:] *= 1e-300
    want = np.minimum(count_pages((gains > 0).sum(1), unit) * unit, tokens)
    for rule in ("xkv", "maxmin", "knapsack"):
        assert allocate(gains, retention=1.0, unit=unit, rule=rule).tolist() == want.tolist()
    for rule in ("pyramid", "uniform"):
        assert (allocate(gains, retention=1.0, unit=unit, rule=rule) >= want).all()
    assert allocate(gains, retention=1.0 - 1e-16).sum() <= want.sum()


def test_layers_that_have_nothing_to_lose() -> None:
    gains = np.array([[0.0, 0, 0], [3, 2, 1]])
    assert allocate(gains, tokens=3).tolist() == [0, 3]
    assert allocate(gains, tokens=3, floor=1).tolist() == [1, 2]
    assert allocate(gains, tokens=5).tolist() == [2, 3], "what is left is spent"
    assert allocate(gains, retention=0.5).tolist() == [0, 0], "the zero row already counts as 1"
    assert measure_layer_retention(gains, 0).tolist() == [1.0, 0.0]
    assert allocate(gains * 0, retention=1.0).tolist() == [0, 0]
    assert allocate(-gains * 0.0, tokens=2).tolist() == [1, 1], "the bits of -0.0 are not those of 0.0"
    assert allocate(gains, tokens=0).tolist() == [0, 0]


def test_budgets_in_every_unit() -> None:
    gains = draw(5, 4, 50)
    for tokens in (0, 58, 199, 200):
        want = allocate(gains, tokens=tokens).tolist()
        assert allocate(gains, n_bytes=tokens * 512 + 511, token_bytes=512).tolist() == want
        assert allocate(gains, n_bytes=tokens * 512, token_bytes=[512] * 4).tolist() == want
        assert tokens == 0 or allocate(gains, ratio=tokens / 200).tolist() == want
    assert allocate(gains, ratio=1 / 200).sum() == 1
    assert allocate(gains, ratio=1.0).tolist() == [50] * 4


@settings(max_examples=15)
@given(seeds, st.integers(1, 3), st.integers(1, 6))
def test_maxmin_raises_the_smallest_retention(seed: int, layers: int, tokens: int) -> None:
    gains = draw(seed, layers, tokens)
    pages, _, kept = list_all(gains)
    totals, smallest = pages.sum(1), kept.min(1)
    for budget in range(seed % 4, layers * tokens + 1, 4):
        got = measure_layer_retention(gains, allocate(gains, tokens=budget, rule="maxmin")).min()
        assert got == smallest[totals <= budget].max()
    for rho in (0.3, 0.9, float(smallest[seed % len(smallest)]) or 0.5):
        got = allocate(gains, retention=rho, rule="maxmin")
        assert got.tolist() == [min(c for c in range(tokens + 1) if one_row(row, c) >= rho) for row in gains]


def one_row(row: np.ndarray, tokens: int) -> float:
    return float(measure_layer_retention(row[None], tokens)[0])


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 10**4))
def test_pyramid_decays_linearly(layers: int, tokens: int, budget: int) -> None:
    gains = np.ones((layers, tokens))
    got = allocate(gains, tokens=budget, rule="pyramid")
    assert got.sum() == min(budget, layers * tokens)
    assert (np.diff(got) <= 0).all()
    mean = budget / layers
    if layers > 1 and 2 * mean - mean / BETA <= tokens:
        assert np.abs(got - np.linspace(2 * mean - mean / BETA, mean / BETA, layers)).max() < 1.5
    if budget <= layers * tokens:
        assert (allocate(gains, tokens=budget + layers, rule="pyramid", floor=1) >= 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_smallest_shapes(rule: str) -> None:
    one = np.array([[2.0]])
    assert [allocate(one, tokens=t, rule=rule).tolist() for t in (0, 1, 2)] == [[0], [1], [1]]
    assert allocate(one, retention=0.1, rule=rule).tolist() == [1]
    assert allocate([[3, 2, 1]], tokens=2, rule=rule).tolist() == [2]
    assert allocate([[3], [2], [1]], tokens=3, rule=rule).tolist() == [1, 1, 1]
    got = allocate(np.array([[2, 1, 1]], np.float16), tokens=2, unit=2, rule=rule)
    assert got.tolist() == [2] and got.dtype == np.int64
    got = allocate(torch.ones(2, 3).T, tokens=7, unit=4, rule=rule)
    assert sorted(got) == [0, 0, 2], "a page costs 4 although its row has 2"


def test_gains_are_not_written_to() -> None:
    gains = draw(0, 3, 9)
    gains[1] = 0
    gains.setflags(write=False)
    for rule in RULES:
        allocate(gains, tokens=7, rule=rule, unit=2)
        allocate(gains, retention=0.7, rule=rule)


def test_huge_and_tiny_gains() -> None:
    for scale in (1e300, 1e-300, 5e-324):
        gains = np.array([[4.0, 2, 1, 1], [5, 1, 1, 1]])
        assert allocate(gains * scale, tokens=3).tolist() == allocate(gains, tokens=3).tolist()
        assert allocate(gains * scale, retention=0.75).tolist() == allocate(gains, retention=0.75).tolist()


G = np.array([[3.0, 2, 1], [2, 2, 2]])


@pytest.mark.parametrize(
    ("gains", "keywords", "says"),
    [
        (G[0], {"tokens": 1}, "2 axes"),
        (G[None], {"tokens": 1}, "2 axes"),
        (G[:, :0], {"tokens": 1}, "2 axes"),
        (G > 1, {"tokens": 1}, "real numbers"),
        (G * 1j, {"tokens": 1}, "real numbers"),
        ([[1.0], [2, 3]], {"tokens": 1}, "cannot read"),
        (torch.ones(2, 3, dtype=torch.bfloat16), {"tokens": 1}, "cannot read"),
        (G - 2, {"tokens": 1}, "at least 0"),
        (G[:, ::-1] - 2, {"tokens": 1, "rule": "knapsack"}, "at least 0"),
        (G * np.inf, {"tokens": 1}, "finite"),
        (np.full((2, 1), np.nan), {"tokens": 1}, "finite"),
        (np.where(G == 2, np.nan, G), {"tokens": 1}, "finite"),
        (np.full((2, 3), 1e308), {"tokens": 1}, "finite sums"),
        (G[:, ::-1], {"tokens": 1}, "never increase"),
        (G[:, ::-1], {"tokens": 1, "rule": "maxmin"}, "never increase"),
        (G, {}, "exactly one"),
        (G, {"tokens": 1, "retention": 0.5}, "tokens and retention"),
        (G, {"tokens": -1}, "tokens: expected a whole number"),
        (G, {"n_bytes": 1}, "token_bytes: give it"),
        (G, {"tokens": 1, "token_bytes": 8}, "token_bytes: give it"),
        (G, {"n_bytes": 9, "token_bytes": 0}, "token_bytes: expected"),
        (G, {"n_bytes": 9, "token_bytes": [1, 2, 3]}, "token_bytes: expected"),
        (G, {"n_bytes": 9, "token_bytes": [1, 2], "rule": "uniform"}, "unequal"),
        (G, {"ratio": 0.0}, "ratio"),
        (G, {"ratio": 1.1}, "ratio"),
        (G, {"retention": float("nan")}, "retention"),
        (G, {"retention": 1.5}, "retention"),
        (G, {"retention": 0.9, "cap": 1}, "at most"),
        (G, {"retention": 1.0, "cap": 2}, "at most"),
        (G, {"retention": 0.5, "cap": [3, 1], "rule": "maxmin"}, "allow 0.333"),
        (G, {"retention": 0.9, "cap": 1, "rule": "knapsack"}, "allow 0.416"),
        (G, {"tokens": 3, "floor": 2}, "floors"),
        (G, {"n_bytes": 11, "token_bytes": [2, 4], "floor": 2}, "need 12"),
        (G, {"tokens": 6, "floor": 2, "cap": 1}, "layer 0 needs"),
        (G, {"tokens": 6, "floor": [0, 4]}, "layer 1 needs"),
        (G, {"tokens": 6, "floor": 2, "cap": 2, "unit": 3}, "pages of 3"),
        (G, {"tokens": 6, "floor": -1}, "floor: expected"),
        (G, {"tokens": 6, "floor": 0.5}, "floor: expected"),
        (G, {"tokens": 6, "cap": [1, 2, 3]}, "cap: expected"),
        (G, {"tokens": 1, "unit": 0}, "unit"),
        (G, {"tokens": 1, "rule": "best"}, "rule: expected xkv"),
        (G, {"tokens": 1, "weights": [1.0]}, "weights: expected 2"),
        (G, {"tokens": 1, "weights": [1.0, 0.0]}, "weights: expected 2"),
        (G, {"tokens": 1, "weights": [1.0, np.inf]}, "weights: expected 2"),
        (G, {"tokens": 1, "weights": [1.0, 1.0], "rule": "maxmin"}, "only the rules"),
        (np.ones((32, 10**4)), {"tokens": 10**5, "rule": "knapsack"}, "larger unit"),
    ],
)
def test_what_cannot_be_allocated_is_refused(gains: Any, keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        allocate(gains, **keywords)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 3"):
        measure_retention(G, 4)
    with pytest.raises(ConfigError, match="tokens: expected"):
        measure_retention(G, [1, 2, 3])
    with pytest.raises(ConfigError, match="weights"):
        measure_retention(G, 1, [1.0])
    assert measure_retention(G, [3, 0], [1, 3]) == 0.25
