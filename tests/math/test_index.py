"""The index: steps, projections, and which columns the paper keeps."""

from __future__ import annotations

import torch

from farkv.math.index import choose_columns, fit_scale, project_keys

B, HKV, T, D, R = 2, 2, 12, 8, 3


def test_padding_does_not_set_the_scale() -> None:
    values = torch.randn(B, HKV, T, R)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[:, :3] = False
    loud = values.clone()
    loud[:, :, :3] = 1e4
    assert torch.equal(fit_scale(loud, valid), fit_scale(values[:, :, 3:], None))


def test_keys_are_centred_then_projected() -> None:
    k, key, mean = torch.randn(B, HKV, T, D), torch.randn(1, HKV, D, R), torch.randn(1, HKV, 1, D)
    exact = (k.double() - mean.double()) @ key.double()
    bound = 4 * D * torch.finfo(torch.float32).eps * ((k - mean).abs().double() @ key.abs().double())
    assert ((project_keys(k, key, mean).double() - exact).abs() <= bound).all()
    half = project_keys(k.bfloat16(), key, mean)
    assert half.dtype == torch.float32


def test_the_papers_columns_are_the_heaviest() -> None:
    q, k = torch.randn(B, HKV, 2 * T, D), torch.randn(B, HKV, T, D)
    skew = torch.linalg.qr(torch.randn(1, HKV, D, D)).Q
    got = choose_columns(q, k, skew, R)
    for b in range(B):
        for h in range(HKV):
            weight = (q[b, h].double() @ skew[0, h].double()).abs().sum(0)
            weight += (k[b, h].double() @ skew[0, h].double()).abs().sum(0)
            best = sorted(weight.topk(R).indices.tolist())
            assert torch.equal(got[b, h], skew[0, h][:, best])
