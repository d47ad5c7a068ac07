"""The native kernels on numbers that numbers should not be: infinities, NaN of any bits, huge, tiny; against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farkv.kernels.native import Native, Rows, list_native
from farkv.math.logits import Logits
from tests.kernels.test_native_select import Shape, make_case

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")

# Quiet ones, one with all bits, one with the lowest alone: what bytes that nobody wrote may be.
NAN_BITS = [0x7FC00000, -0x400000, -1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF]
LOGITS = [-math.inf, -3e38, -1e30, -200.0, -88.5, -87.4, -87.0, -50.0, -1.0, -1e-3, -1e-40, 0.0, 1e-3, 1.0, 20.0]


@pytest.fixture(params=list_native() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


def weigh(kernels: Native, logits: Tensor, **how: float) -> Tensor:
    """The softmax of rows of logits, [N, S], by a kernel: keys of one number, values that are unit vectors."""
    n, s = logits.shape
    rows = torch.cat([logits[:, None, :, None], torch.eye(s).expand(n, 1, s, s)], -1).contiguous()
    return kernels.attend(torch.ones(n, 1, 1, 1), Rows(rows, 1, s), Logits(1.0, **how), positions=None, n=s)[:, 0, 0]


def test_exponentials_of_any_difference(kernels: Native) -> None:
    low = torch.tensor(LOGITS)
    for base in (0.0, 5.0, -3e38, 3e38):
        logits = torch.stack([torch.full_like(low, base), low], -1)
        torch.testing.assert_close(weigh(kernels, logits), logits.softmax(-1), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_logits_below_any_number_that_a_maximum_starts_from(kernels: Native, n: int) -> None:
    logits = torch.full((1, n), -3e38)
    logits[0, n // 2] = -1e38
    torch.testing.assert_close(weigh(kernels, logits), logits.softmax(-1))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("bits", NAN_BITS)
def test_nan_of_any_bits_stays_nan(kernels: Native, bits: int, at: int, softcap: float | None) -> None:
    logits = torch.randn(2, 40)
    logits[0, at] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    found = weigh(kernels, logits, **{} if softcap is None else {"softcap": softcap})
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_infinities(kernels: Native) -> None:
    logits = torch.randn(3, 40)
    logits[0, 7] = math.inf
    logits[1, 7] = -math.inf
    found = weigh(kernels, logits)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], logits[1:].softmax(-1))
    capped = logits.clamp(-1e30, 1e30)
    torch.testing.assert_close(
        weigh(kernels, logits, softcap=3.0), (3 * torch.tanh(capped / 3)).softmax(-1), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 50.0, 1e4, 1e8, 1e20])
def test_a_softcap_of_any_size_is_as_exact(kernels: Native, softcap: float) -> None:
    logits = 3 * torch.randn(5, 40)
    expected = (softcap * torch.tanh(logits.double() / softcap)).softmax(-1).float()
    torch.testing.assert_close(weigh(kernels, logits, softcap=softcap), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [*NAN_BITS, math.inf, -math.inf, 3e38, 1e-42])
@pytest.mark.parametrize("part", ["q", "query", "tables"])
@pytest.mark.parametrize(
    "shape", [Shape(1, 2, 2, 16, 32, 90), Shape(1, 1, 4, 16, 32, 5000, 8, 4), Shape(1, 1, 3, 9, 14, 300, 2)]
)
def test_a_choice_by_spoiled_operands_is_a_choice(kernels: Native, shape: Shape, part: str, value: float) -> None:
    case = make_case(shape)
    x = case.q if part == "q" else getattr(case.index, part)
    x.view(-1)[3] = torch.tensor([value], dtype=torch.int32).view(torch.float32) if isinstance(value, int) else value
    chosen = kernels.select(case.q, case.index, case.logits, cap=20, n=shape.n, sinks=4)
    assert (chosen[..., 1:] > chosen[..., :-1]).all()
    assert chosen.min() == 0
    assert chosen.max() < shape.n
