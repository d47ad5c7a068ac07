"""The index: how far a code may be from its value, and which columns the paper keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.index import CODE_MAX, choose_columns, encode_keys, fit_scale, pack_codes, project_keys
from farkv.math.score import unpack_codes

B, HKV, T, D, R = 2, 2, 12, 8, 3


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(0.1, 3.0))
def test_a_code_is_within_half_a_step(bits: int, seed: int, size: float, later: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.randn(B, HKV, T, R, generator=generator) * size
    largest = CODE_MAX[bits]
    scale = fit_scale(fitted, None, bits)
    for values in (fitted, fitted * later):
        codes = encode_keys(values.clone(), scale, bits)
        assert codes.dtype == torch.int8
        inside = values.abs() <= largest * scale
        error = (values.double() - codes.double() * scale.double()).abs()
        assert (error <= scale.double() * (0.5 + 1e-4))[inside].all()
        assert (codes.abs() == largest)[~inside].all()
    assert (fitted.abs() <= largest * scale * (1 + 1e-6)).all(), "what was fitted does not clip"


def test_two_codes_share_a_byte() -> None:
    codes = torch.randint(-7, 8, (B, HKV, T, 6), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.shape == (B, HKV, T, 3)
    assert torch.equal(unpack_codes(packed), codes)


def test_padding_does_not_set_the_scale() -> None:
    values = torch.randn(B, HKV, T, R)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[:, :3] = False
    loud = values.clone()
    loud[:, :, :3] = 1e4
    assert torch.equal(fit_scale(loud, valid), fit_scale(values[:, :, 3:], None))


def test_zeros_are_encoded_as_zeros() -> None:
    zeros = torch.zeros(B, HKV, T, R)
    assert (encode_keys(zeros, fit_scale(zeros, None)) == 0).all()


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
