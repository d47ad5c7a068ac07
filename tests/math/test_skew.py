"""The skew: full rank changes nothing, fewer columns lose as little as any choice of them can."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.skew import RIDGE, Gram, measure_gram, solve_bilinear, solve_svd, solve_white

B, HKV, G, T, D = 2, 2, 2, 40, 8
EPS = torch.finfo(torch.float32).eps


def make(seed: int, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of uneven columns, with a common offset of the keys as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, D, D, generator=generator) * torch.logspace(0, -2, D)[None, :, None]
    q = torch.randn(B, HKV * G, tokens, D, generator=generator) @ mix[0]
    k = torch.randn(B, HKV, tokens, D, generator=generator) @ mix[1] + 3 * torch.randn(D, generator=generator)
    return q, k


def ridged(moment: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(D, dtype=torch.float64)
    return moment + RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye


@given(st.integers(0, 10**6), st.sampled_from([2, 5, T]))
def test_full_rank_gives_the_centred_scores_back(seed: int, tokens: int) -> None:
    q, k = make(seed, tokens)
    a_q, a_k, mean = solve_bilinear(measure_gram(q, k, None))
    # Rounding both factors to float32 moves their product by at most this, element by element.
    bound = 2 * EPS * (a_q.double().abs() @ a_k.double().abs().mT)
    off = (a_q.double() @ a_k.double().mT - torch.eye(D)).abs()
    assert (off <= bound + 1e-7).all()
    assert torch.allclose(mean[:, :, 0].double(), k.double().mean(2), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([2, 5, T]))
def test_where_queries_are_white_scores_are_the_same_and_keys_widest_first(seed: int, tokens: int) -> None:
    q, k = make(seed, tokens)
    a_q, a_k, mean = solve_white(measure_gram(q, k, None))
    bound = 2 * EPS * (a_q.double().abs() @ a_k.double().abs().mT)
    assert ((a_q.double() @ a_k.double().mT - torch.eye(D)).abs() <= bound + 1e-7).all()
    # The moments are of float32, and so is the result.
    moment = ridged(measure_gram(q, k, None).queries.double())
    white = a_q.double().mT @ moment @ a_q.double()
    rounding = 4 * EPS * (a_q.double().abs().mT @ moment.abs() @ a_q.double().abs())
    assert ((white - torch.eye(D)).abs() <= rounding + 1e-7).all()
    keys = (k.double() - mean.double()) @ a_k.double()
    spread = keys.square().sum(2)
    assert (spread[..., :-1] >= spread[..., 1:] * (1 - 1e-3) - 1e-6 * spread[..., :1]).all()


@given(st.integers(0, 10**6), st.integers(1, D - 1))
def test_bilinear_loses_no_more_than_the_papers_columns(seed: int, rank: int) -> None:
    q, k = make(seed)
    gram = measure_gram(q, k, None)
    a_q, a_k, mean = (t.double() for t in solve_bilinear(gram))
    skew = solve_svd(gram).double()
    queries = q.double().reshape(B, HKV, -1, D)
    centred = k.double() - mean
    true = queries @ centred.mT

    def error(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        estimate = (queries @ left[..., :rank]) @ (centred @ right[..., :rank]).mT
        return ((true - estimate) ** 2).sum((-2, -1))

    # The solution is the best for the ridged moments; theirs is the bound, and rounding is far below the slack.
    c_q, c_k = ridged(gram.queries.double()), centred.mT @ centred + ridged(gram.keys.double()) - gram.keys.double()
    rest = torch.eye(D) - skew[..., :rank] @ skew[..., :rank].mT
    bound = torch.einsum("bhij,bhjk,bhkl,bhil->bh", c_q, rest, c_k, rest)
    assert (error(a_q, a_k) <= bound * (1 + 1e-4)).all()
    assert (error(a_q, a_k) <= error(skew, skew) * 1.05 + 1e-6 * true.square().sum((-2, -1))).all()


@given(st.integers(0, 10**6))
def test_the_papers_skew_is_orthogonal_and_sorted(seed: int) -> None:
    q, k = make(seed)
    skew = solve_svd(measure_gram(q, k, None)).double()
    assert torch.allclose(skew.mT @ skew, torch.eye(D, dtype=torch.float64).expand(B, HKV, D, D), atol=8 * D * EPS)
    energy = (q.double().reshape(B, HKV, -1, D) @ skew).square().sum(2)
    assert (energy.diff(dim=-1) <= 1e-5 * energy.amax(-1, True)).all()


def test_degenerate_inputs_stay_finite() -> None:
    for q, k in (make(0, 1), make(1, 2), (torch.zeros(B, HKV * G, 3, D), torch.zeros(B, HKV, 3, D))):
        gram = measure_gram(q, k, None)
        assert all(t.isfinite().all() for t in (*solve_bilinear(gram), solve_svd(gram)))
    q, k = make(2)
    padding = torch.zeros(B, T, dtype=torch.bool)
    gram = measure_gram(q * 0, k, padding)
    assert all(t.isfinite().all() for t in solve_bilinear(gram))


def test_padding_counts_for_nothing() -> None:
    q, k = make(3)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[:, :10] = False
    whole = measure_gram(q * valid[:, None, :, None], k, valid)
    part = measure_gram(q[:, :, 10:], k[:, :, 10:], None)
    for name in ("queries", "keys", "key_sum", "n_keys"):
        assert torch.allclose(getattr(whole, name), getattr(part, name), rtol=1e-4, atol=1e-3)


def test_moments_add_up() -> None:
    q, k = make(4)
    halves = [measure_gram(q[:, :, i : i + 20], k[:, :, i : i + 20], None) for i in (0, 20)]
    total, whole = halves[0].add(halves[1]).sum_batch(), measure_gram(q, k, None).sum_batch()
    assert isinstance(total, Gram)
    assert torch.allclose(total.keys, whole.keys, rtol=1e-4, atol=1e-3)
    assert total.n_keys.item() == B * T
