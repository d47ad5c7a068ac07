"""Rows split into pairs of integers in C, against the rows themselves and the plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farkv.errors import CacheStateError
from farkv.kernels.native import Native, list_native
from farkv.math import halves

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")
SIZES = ((1, 1), (1, 7), (3, 64), (5, 97), (40, 33))


@pytest.fixture(params=list_native() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


def put_together(parts: Tensor, unit: Tensor) -> Tensor:
    """Return what the parts stand for once a kernel has rounded them, in float64."""
    high, low = parts.double().round().chunk(2)
    return (high + low / halves.STEPS) / unit.double()


@pytest.mark.parametrize("size", SIZES)
def test_parts_stand_for_the_rows(kernels: Native, size: tuple[int, int]) -> None:
    torch.manual_seed(size[1])
    rows = torch.randn(size) * torch.logspace(-20, 20, size[0])[:, None]
    rows[-1] = 0
    rows[0, -1] *= 1000
    for by in (kernels, halves):
        parts, unit = by.split_rows(rows)
        # What fits into 7 bits beside 64; a low part may be rounded beyond by the last bit of float32.
        assert float(parts.abs().max()) <= halves.HALF + 0.01
        error = (put_together(parts, unit) - rows.double()).abs()
        assert (error <= 1.001 * rows.double().abs().amax(1, keepdim=True) / (2 * halves.HALF * halves.STEPS)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_put_together(kernels: Native, size: tuple[int, int], has_bias: bool) -> None:
    torch.manual_seed(size[1])
    n, width = size
    products, unit = torch.randn(2 * n, width), torch.rand(n, 1) + 0.1
    bias = torch.randn(width) if has_bias else None
    high, low = products.double().chunk(2)
    want = (high + low / halves.STEPS) / unit.double() + (0 if bias is None else bias.double())
    for by in (kernels, halves):
        got = by.join_rows(products.clone(), unit, bias)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 12])
def test_a_row_that_is_not_finite_has_no_unit(kernels: Native, bad: float, place: int) -> None:
    rows = torch.ones(3, 13)
    rows[1, place] = bad
    for by in (kernels, halves):
        parts, unit = by.split_rows(rows)
        assert unit.isfinite().flatten().tolist() == [True, False, True]
        got = by.join_rows(parts.nan_to_num(), unit, None)
        assert got.isfinite().all(1).tolist() == [True, False, True]
        assert got.isfinite().any(1).tolist() == [True, False, True]


def test_one_thread_and_several_agree(kernels: Native) -> None:
    rows, threads = torch.randn(23, 100), torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            parts, unit = kernels.split_rows(rows)
            found.append((parts, unit, kernels.join_rows(parts.clone(), unit, rows[0].contiguous())))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_c_cannot_read_is_refused(kernels: Native) -> None:
    rows = torch.randn(4, 8)
    with pytest.raises(CacheStateError, match="contiguous"):
        kernels.split_rows(rows.T)
    parts, unit = kernels.split_rows(rows)
    with pytest.raises(CacheStateError, match="as many rows"):
        kernels.join_rows(parts[:-1], unit, None)
