"""The promise: how often it holds on prompts that it has not seen, and when it is not given."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farkv.calibrate.conformal import allocate_promise, average_allocations
from farkv.errors import ConfigError
from farkv.math.allocate import accumulate, allocate, look_up, measure_retention, weigh

L, N = 4, 32


def draw_prompts(rng: np.random.Generator, n: int, layers: int = L, tokens: int = N) -> np.ndarray:
    """Return exchangeable gain curves: power laws whose exponents differ by layer and by prompt."""
    decay = np.linspace(0.4, 1.4, layers) + 0.5 * rng.random((n, 1)) + 0.3 * rng.random((n, layers))
    loud = np.exp(2 * rng.normal(size=(n, layers, 1)))
    return loud * np.arange(1, tokens + 1) ** -decay[..., None]


def share_kept(tokens: np.ndarray, prompts: np.ndarray, retention: float) -> float:
    return float((weigh(look_up(accumulate(prompts), tokens), np.ones(prompts.shape[1])) >= retention).mean())


def test_an_unseen_prompt_keeps_its_retention_as_often_as_promised() -> None:
    rng, draws, n, confidence = np.random.default_rng(0), 40, 19, 0.8
    held = []
    for _ in range(draws):
        fit, calibration = draw_prompts(rng, 4), draw_prompts(rng, n)
        made = allocate_promise(fit, calibration, retention=0.85, confidence=confidence)
        held.append(share_kept(made.tokens, draw_prompts(rng, 400), 0.85))
    # At least the confidence, at most 1 / (n + 1) more and a little for tied scores; three standard errors.
    error = 3 * np.std(held) / np.sqrt(draws)
    assert error < 0.05
    assert confidence - error <= np.mean(held) <= confidence + 1 / (n + 1) + 0.01 + error


def test_the_papers_mean_of_allocations_promises_nothing() -> None:
    rng = np.random.default_rng(1)
    samples, unseen = draw_prompts(rng, 40), draw_prompts(rng, 200)
    mean = average_allocations(samples, retention=0.85)
    made = allocate_promise(samples[:10], samples[10:], retention=0.85)
    assert share_kept(mean, unseen, 0.85) < 0.7
    assert share_kept(made.tokens, unseen, 0.85) > 0.85


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.floats(0.05, 1.0), st.booleans())
def test_it_is_the_least_budget_that_enough_samples_accept(
    seed: int, n: int, unit: int, retention: float, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    fit, calibration = draw_prompts(rng, 1, 2, 5), draw_prompts(rng, n, 2, 5)
    weights = [1.0, 3.0] if weighted else None
    confidence = n / (n + 1) if seed % 2 else 0.5
    options: dict[str, Any] = {"weights": weights, "floor": [0, 1], "unit": unit}
    made = allocate_promise(fit, calibration, retention=retention, confidence=confidence, **options)
    scores = []
    for sample in calibration:
        budget = unit
        while measure_retention(sample, allocate(fit[0], tokens=budget, **options), weights) < retention:
            budget += unit
        scores.append(budget)
    rank = n if seed % 2 else -(-(n + 1) // 2)
    assert made.budget == sorted(scores)[rank - 1]
    assert made.tokens.tolist() == allocate(fit[0], tokens=made.budget, **options).tolist()
    assert (made.n_calibration, made.confidence) == (n, confidence)


def test_more_confidence_or_retention_never_costs_less() -> None:
    rng = np.random.default_rng(2)
    fit, calibration = draw_prompts(rng, 5), draw_prompts(rng, 30)
    for name, values in {"confidence": (0.1, 0.5, 0.8, 0.9, 0.96), "retention": (0.1, 0.5, 0.9, 0.99, 1.0)}.items():
        options: list[dict[str, Any]] = [{"confidence": 0.8, "retention": 0.8, name: value} for value in values]
        made = [allocate_promise(fit, calibration, **option) for option in options]
        for less, more in itertools.pairwise(made):
            assert less.budget <= more.budget
            assert (less.tokens <= more.tokens).all()


def test_the_family_is_optimal_for_the_mean_sample() -> None:
    rng = np.random.default_rng(3)
    fit = draw_prompts(rng, 6, 2, 8)
    fit[:4, 0] = 0
    made = allocate_promise(fit, fit[4:5], retention=0.6, confidence=0.5)
    best = max(np.mean([measure_retention(p, [a, made.budget - a]) for p in fit]) for a in range(made.budget + 1))
    assert np.mean([measure_retention(p, made.tokens) for p in fit]) == pytest.approx(best, abs=1e-12)


def test_nothing_to_lose_costs_the_floor() -> None:
    zeros = np.zeros((3, L, N))
    made = allocate_promise(zeros, zeros, retention=1.0, confidence=0.5, floor=3, unit=2)
    assert made.tokens.tolist() == [4] * L and made.budget == 4 * L


def test_each_sample_alone_then_the_mean() -> None:
    rng = np.random.default_rng(4)
    samples = draw_prompts(rng, 5)
    budgets: list[dict[str, Any]] = [{"tokens": 100}, {"retention": 0.8}, {"ratio": 0.3, "rule": "maxmin"}]
    for budget in budgets:
        alone = [allocate(sample, **budget) for sample in samples]
        assert average_allocations(samples, **budget).tolist() == np.rint(np.mean(alone, 0)).tolist()
    with pytest.raises(ConfigError, match="3 axes"):
        average_allocations(samples[0], tokens=1)


A = draw_prompts(np.random.default_rng(5), 12)


@pytest.mark.parametrize(
    ("fit", "calibration", "options", "says"),
    [
        (A, A[:8], {}, "needs 9 samples, got 8"),
        (A, A, {"confidence": 0.95}, "needs 19 samples, got 12"),
        (A, A, {"confidence": 1.0}, "between 0 and 1"),
        (A, A, {"confidence": 0.0}, "between 0 and 1"),
        (A, A, {"retention": 0.0}, "retention"),
        (A, A, {"cap": 3}, "caps allow"),
        (A, A[:, :2], {}, "like fit"),
        (A, A[0], {}, "3 axes"),
        (A[:0], A, {}, "3 axes"),
        (A, A[..., ::-1], {}, "never increase"),
        (A, A, {"weights": [1.0]}, "weights"),
        (A, A, {"floor": N + 1}, "layer 0 needs"),
    ],
)
def test_a_promise_that_cannot_be_given_is_refused(fit: Any, calibration: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        allocate_promise(fit, calibration, **({"retention": 0.9} | options))


def test_exactly_as_many_samples_as_are_needed_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for confidence, n in ((0.9, 9), (0.8, 4), (0.5, 1)):
            allocate_promise(A, A[:n], retention=0.9, confidence=confidence)
            if n > 1:
                with pytest.raises(ConfigError, match=f"needs {n} samples"):
                    allocate_promise(A, A[: n - 1], retention=0.9, confidence=confidence)
