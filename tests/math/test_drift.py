"""The share of scores' variance that an index misses: against plain loops, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farkv.math.drift import EVERY, SHARE_EVERY, WORSE, find_next, is_worse, measure_unexplained


def make(batch: int = 2, heads: int = 3, n: int = 5, s: int = 17) -> tuple[Tensor, Tensor]:
    exact = torch.randn(batch, heads, n, s) * 3
    return exact, exact + torch.randn_like(exact)


def measure_plainly(exact: Tensor, estimated: Tensor, asked: Tensor, real: Tensor) -> list[float]:
    shares = []
    for b in range(len(exact)):
        heads = []
        for h in range(exact.shape[1]):
            missed = whole = 0.0
            for i in asked[b].nonzero().flatten().tolist():
                a, e = exact[b, h, i][real[b]].double(), estimated[b, h, i][real[b]].double()
                missed += float((a - e).var(correction=0) * len(a))
                whole += float(a.var(correction=0) * len(a))
            heads.append(missed / whole)
        shares.append(sum(heads) / len(heads))
    return shares


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_definition(padded: bool) -> None:
    exact, estimated = make()
    asked, real = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 17, dtype=torch.bool)
    if padded:
        asked[1, :2], real[1, :6] = False, False
        exact[1, :, :2], exact[1, :, :, :6] = torch.nan, torch.inf
    got = measure_unexplained(exact, estimated, asked if padded else None, real if padded else None)
    assert got.tolist() == pytest.approx(measure_plainly(exact, estimated, asked, real), rel=1e-4)


@given(st.floats(-50, 50), st.floats(0.1, 9))
def test_what_changes_no_choice_changes_nothing(shift: float, size: float) -> None:
    exact, estimated = make()
    before = measure_unexplained(exact, estimated, None, None)
    moved = measure_unexplained(exact, estimated + shift, None, None)
    assert torch.allclose(moved, before, rtol=1e-2)
    assert torch.allclose(measure_unexplained(exact * size, estimated * size, None, None), before, rtol=1e-3)


def test_the_best_and_the_useless_index() -> None:
    exact, _ = make()
    assert measure_unexplained(exact, exact + 1, None, None).abs().max() < 1e-6
    assert torch.allclose(measure_unexplained(exact, torch.zeros_like(exact), None, None), torch.ones(2))


def test_heads_that_say_nothing_do_not_count() -> None:
    exact, estimated = make()
    expected = measure_unexplained(exact[:, :1], estimated[:, :1], None, None)
    exact[:, 1], exact[:, 2] = torch.nan, 7.0
    assert torch.allclose(measure_unexplained(exact, estimated, None, None), expected)
    assert measure_unexplained(torch.ones_like(exact), estimated, None, None).tolist() == [0.0, 0.0]


def test_what_is_worse() -> None:
    assert not is_worse(0.1 * WORSE, 0.1)
    assert is_worse(0.1 * WORSE + 1e-6, 0.1)
    assert is_worse(1e-9, 0.0)
    assert not is_worse(0.5, math.nan), "what is not known is not worse"


@given(st.integers(1, 1 << 20))
def test_all_fits_together_code_every_token_about_sixteen_times(n: int) -> None:
    n_new = find_next(n) - n
    assert n_new >= EVERY
    assert find_next(n) <= (SHARE_EVERY + 1.1) * n_new
