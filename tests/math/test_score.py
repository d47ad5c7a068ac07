"""Speculation against loops in float64."""

from __future__ import annotations

import math

import torch

from farkv.math.logits import Logits
from farkv.math.score import pool_group, pool_group_by_best, project_query, score_index, score_keys

B, HKV, G, S, D, R = 2, 3, 2, 11, 8, 4
PLAIN = Logits(0.3)
EPS = torch.finfo(torch.float32).eps


def make() -> tuple[torch.Tensor, ...]:
    return torch.randn(B, HKV * G, 1, D), torch.randn(1, HKV, D, R), torch.randn(B, HKV, S, R)


def twin(q: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Plain dot products, one head at a time."""
    out = torch.empty(B, HKV, G, S, dtype=torch.float64)
    for b in range(B):
        for h in range(HKV):
            for g in range(G):
                projected = q[b, h * G + g, 0].double() @ query[0, h].double()
                out[b, h, g] = keys[b, h].double() @ projected * scaling
    return out


def test_scores_are_dot_products_of_projected_keys() -> None:
    q, query, keys = make()
    got = score_index(project_query(q, query, PLAIN), keys, PLAIN)
    expected = twin(q, query, keys, 0.3)
    # Each score sums D * R products: the bound of float32 summation over their magnitudes.
    bound = 4 * D * EPS * twin(q.abs(), query.abs(), keys.abs(), 0.3)
    assert ((got - expected).abs() <= bound).all()


def test_softcap_bends_scores() -> None:
    q, query, keys = make()
    projected = project_query(q, query, PLAIN)
    expected = 5.0 * torch.tanh(score_index(projected, keys, PLAIN) / 5.0)
    assert torch.equal(score_index(projected, keys, Logits(0.3, 5.0)), expected)


def test_pooling_is_the_groups_mean_weight() -> None:
    scores = torch.randn(B, HKV, G, S) * 3
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :4] = False
    pooled = pool_group(scores, None if valid is None else valid[:, None])
    hidden = scores.double().masked_fill(~valid[:, None, None], -math.inf)
    expected = hidden.softmax(-1).mean(2)
    assert torch.allclose(pooled.double().exp(), expected, rtol=64 * EPS, atol=0)
    assert (pooled[0, :, :4] == -math.inf).all()


def test_pooling_by_the_best_compares_with_each_querys_maximum() -> None:
    scores = torch.randn(B, HKV, G, S) * 3
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :5] = False
    pooled = pool_group_by_best(scores, None if valid is None else valid[:, None])
    hidden = scores.masked_fill(~valid[:, None, None], -math.inf)
    assert torch.equal(pooled, (hidden - hidden.amax(-1, True)).amax(2))
    assert (pooled.amax(-1) == 0).all()


def test_a_row_of_padding_alone_gives_no_nan() -> None:
    valid = torch.zeros(B, S, dtype=torch.bool)
    for pool in (pool_group, pool_group_by_best):
        assert (pool(torch.randn(B, HKV, G, S), valid[:, None]) == -math.inf).all()


def test_the_oracle_scores_true_logits() -> None:
    q, k = torch.randn(B, HKV * G, 1, D), torch.randn(B, HKV, S, D)
    got = score_keys(q, k, Logits(0.25))
    exact = torch.einsum("bhgd,bhsd->bhgs", q.double().view(B, HKV, G, D), k.double()) * 0.25
    noise = (torch.einsum("bhgd,bhsd->bhgs", q.view(B, HKV, G, D), k) * 0.25 - exact).abs().max()
    assert (got - exact).abs().max() <= 4 * noise
    assert torch.equal(score_keys(q, k, Logits(0.25, 3.0)), 3.0 * torch.tanh(got / 3.0))
