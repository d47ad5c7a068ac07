"""What every choice keeps: the cap, the sinks, real tokens before padding, ascending order, kept ones first."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.select import (
    Choice,
    force_sinks,
    select_mass,
    select_mean_count,
    select_rest,
    select_top,
    select_within,
)

B, HKV = 2, 3


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """Pooled log-weights with padding hidden, the validity, a cap, sinks."""
    n = draw(st.integers(2, 40))
    cap = draw(st.integers(1, n))
    sinks = draw(st.integers(0, cap // 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.randn(B, HKV, n, generator=generator) * draw(st.sampled_from([0.0, 1.0, 8.0]))
    valid = None
    if draw(st.booleans()):
        valid = torch.arange(n) >= torch.tensor([draw(st.integers(0, n - 1)) for _ in range(B)])[:, None]
        scores = scores.masked_fill(~valid[:, None], -math.inf)
    scores = scores.log_softmax(-1)
    return force_sinks(scores, sinks, None if valid is None else valid[:, None]), valid, cap, sinks


def chosen(choice: Choice) -> list[list[int]]:
    """Return the kept positions of every row."""
    positions = choice.positions.flatten(0, 1)
    keep = torch.ones_like(positions, dtype=torch.bool) if choice.valid is None else choice.valid.flatten(0, 1)
    return [row[flag].tolist() for row, flag in zip(positions, keep, strict=True)]


def check(choice: Choice, scores: torch.Tensor, valid: torch.Tensor | None, cap: int, sinks: int) -> None:
    n = scores.shape[-1]
    assert choice.positions.shape == (B, HKV, cap)
    assert choice.positions.min() >= 0
    assert choice.positions.max() < n
    if choice.valid is not None:
        packed = choice.valid.int().diff(dim=-1)
        assert (packed <= 0).all(), "kept ones stand first"
    for i, row in enumerate(chosen(choice)):
        assert 1 <= len(row) <= cap
        assert row == sorted(set(row)), "ascending, none twice"
        real = list(range(n)) if valid is None else valid[i // HKV].nonzero().flatten().tolist()
        assert set(real[:sinks]) <= set(row), "sinks always"
        if set(row) - set(real):
            assert set(real) <= set(row), "padding only where real tokens are exhausted"


@given(cases())
def test_the_best_are_chosen(case: tuple[torch.Tensor, torch.Tensor | None, int, int]) -> None:
    scores, valid, cap, sinks = case
    choice = select_top(scores, cap)
    check(choice, scores, valid, cap, sinks)
    worst_in = scores.gather(-1, choice.positions).amin(-1)
    left = scores.scatter(-1, choice.positions, -math.inf).amax(-1)
    assert (worst_in >= left).all()


@given(cases(), st.sampled_from([0.5, 2.0, 100.0]))
def test_alpha_keeps_what_is_near_the_best(
    case: tuple[torch.Tensor, torch.Tensor | None, int, int], alpha: float
) -> None:
    scores, valid, cap, sinks = case
    choice = select_within(scores, cap, alpha)
    check(choice, scores, valid, cap, sinks)
    for row, values in zip(chosen(choice), scores.flatten(0, 1), strict=True):
        finite = values[values.isfinite()]
        near = set(
            (values.isposinf() | (values > (finite.max() if len(finite) else 0) - alpha)).nonzero().flatten().tolist()
        )
        assert set(row) <= near
        assert len(row) == min(cap, len(near))


@given(cases(), st.sampled_from([0.5, 2.0, 100.0]))
def test_the_papers_count_is_one_mean_for_all(
    case: tuple[torch.Tensor, torch.Tensor | None, int, int], alpha: float
) -> None:
    scores, valid, cap, _ = case
    scores = scores.nan_to_num(posinf=1.0, neginf=-math.inf)
    choice = select_mean_count(scores, cap, alpha)
    check(choice, scores, valid, cap, 0)
    counts = [sum(x > max(row) - alpha for x in row) for row in scores.flatten(0, 1).tolist()]
    expected = max(1, min(cap, math.floor(sum(counts) / len(counts))))
    assert [len(row) for row in chosen(choice)] == [expected] * (B * HKV)


@given(cases(), st.sampled_from([0.2, 0.7, 1.0]))
def test_mass_stops_as_soon_as_it_is_reached(
    case: tuple[torch.Tensor, torch.Tensor | None, int, int], top_p: float
) -> None:
    scores, valid, cap, sinks = case
    choice = select_mass(scores, cap, top_p)
    check(choice, scores, valid, cap, sinks)
    for row, values in zip(chosen(choice), scores.flatten(0, 1), strict=True):
        weights = torch.where(values.isposinf(), 0.0, values.exp())[row]
        free = weights[~values[row].isposinf()]
        if len(row) < min(cap, int((values > -torch.inf).sum())):
            assert weights.sum() >= top_p - 1e-5
        if len(free):
            assert weights.sum() - free.min() < top_p + 1e-5, "one fewer would do"


@given(cases())
def test_a_top_up_takes_the_best_of_the_rest(case: tuple[torch.Tensor, torch.Tensor | None, int, int]) -> None:
    scores, valid, cap, _ = case
    late = min(cap, scores.shape[-1] - cap)
    if late == 0:
        return
    for first in (select_top(scores, cap), select_within(scores, cap, 1.0)):
        second = select_rest(scores.clone(), first, late)
        for i, (a, b) in enumerate(zip(chosen(first), chosen(second), strict=True)):
            real = scores.shape[-1] if valid is None else int(valid[i // HKV].sum())
            left = real - len([p for p in a if valid is None or valid[i // HKV, p]])
            assert not set(a) & set(b), "a record that is read twice would weigh twice"
            assert len(b) == min(late, left)


@given(cases(), st.integers(1, 10))
def test_every_sequence_keeps_to_its_own_cap(
    case: tuple[torch.Tensor, torch.Tensor | None, int, int], fewer: int
) -> None:
    scores, _, cap, _ = case
    own = torch.tensor([cap, max(1, cap - fewer)])[:, None, None]
    rules: list[Callable[..., Choice]] = [
        select_top,
        lambda s, k, own=None: select_within(s, k, 2.0, own),
        lambda s, k, own=None: select_mass(s, k, 0.7, own),
    ]
    for rule in rules:
        rows = chosen(rule(scores, cap, own))
        for b in range(B):
            alone, values = rule(scores[b : b + 1], int(own[b])), scores[b]
            for h, (mine, theirs) in enumerate(zip(rows[b * HKV : (b + 1) * HKV], chosen(alone), strict=True)):
                # Of equal scores any may be taken; what is out of reach is not.
                reached = [p for p in theirs if values[h, p] > -math.inf]
                assert sorted(values[h, mine].tolist()) == sorted(values[h, reached].tolist())
