"""Rounded records against a decoder that shares no line with ours, and against the bound that is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import ConfigError
from farkv.store.far import quantize
from farkv.store.far.quantize import Codec, encoded_bytes
from farkv.store.far.rows import Rows, gather_rows
from farkv.store.ledger import Ledger

DIMS = [8, 16, 24, 32, 64, 80, 96, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["int8", "int4"]
# What half a unit in the last place is, relatively, and the least number.
ROUNDING = {
    torch.float32: (2**-24, 2**-149),
    torch.bfloat16: (2**-8, 2**-133),
    torch.float16: (2**-11, 2**-24),
}
HUGE = {torch.float32: 1e38, torch.bfloat16: 1e4, torch.float16: 6e4}
KINDS = ["normal", "zero", "constant", "tiny", "subnormal", "huge", "mixed", "one", "far above zero", "far below zero"]


def make(kind: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    x = torch.randn(shape)
    huge = HUGE[dtype]
    match kind:
        case "zero":
            x = x * 0
        case "constant":
            x = torch.full(shape, -3.3)
        case "tiny":
            x = x * 1e-30
        case "subnormal":
            x = x * 1e-38
        case "huge":
            x = x.sign() * huge * (1 - torch.rand(shape) * 1e-3)
        case "mixed":
            x = x * 10.0 ** torch.empty(shape).uniform_(-30, math.log10(huge) - 1)
        case "one":
            x = torch.where(torch.rand(shape) < 0.05, x * 100, 0)
        case "far above zero" | "far below zero":
            x = (huge / 2 + x * (huge * 1e-3)) * (1 if kind == "far above zero" else -1)
    return x.to(dtype)


def unbfloat(data: bytes) -> float:
    return float(np.frombuffer(b"\0\0" + data, dtype="<f4")[0])


def decode_part(name: str, row: bytes, at: int, params_at: int, dim: int) -> tuple[list[float], list[float]]:
    """Return the exact values of K or V and the step of each, from the bytes alone."""
    n = -(-dim // 32)
    steps = [unbfloat(row[params_at + 2 * g : params_at + 2 * g + 2]) for g in range(n)]
    lows = (
        [unbfloat(row[params_at + 2 * (n + g) : params_at + 2 * (n + g) + 2]) for g in range(n)]
        if name == "int4"
        else []
    )
    values = []
    for i in range(dim):
        g, j = divmod(i, 32)
        if name == "int8":
            code = row[at + i]
            values.append((code - 256 if code > 127 else code) * steps[g])
        else:
            half = (min(32, dim - 32 * g) + 1) // 2
            byte = row[at + 16 * g + j % half]
            values.append(lows[g] + (byte >> 4 if j >= half else byte & 15) * steps[g])
    return values, [steps[i // 32] for i in range(dim)]


def decode_slowly(codec: Codec, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and steps in float64, [N, Dk + Dv]."""
    k, v = codec.k_dim, codec.v_dim
    k_codes, v_codes = (k, v) if codec.name == "int8" else ((k + 1) // 2, (v + 1) // 2)
    start = k_codes + v_codes + (k_codes + v_codes) % 2
    of_k = 2 * -(-k // 32) * (1 if codec.name == "int8" else 2)
    values, steps = [], []
    for row in rows.reshape(-1, codec.row_bytes).numpy():
        parts = [
            decode_part(codec.name, row.tobytes(), 0, start, k),
            decode_part(codec.name, row.tobytes(), k_codes, start + of_k, v),
        ]
        values.append(parts[0][0] + parts[1][0])
        steps.append(parts[0][1] + parts[1][1])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(steps, dtype=torch.float64)


def check(codec: Codec, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, error: float) -> None:
    """Hold what is decoded against the slow decoder and the promised bound, and the steps against the values."""
    name, dtype, decoded = codec.name, codec.dtype, codec.decode(rows)
    exact, steps = decode_slowly(codec, rows)
    most = torch.finfo(dtype).max
    assert torch.equal(decoded.flatten(0, 2), exact.clamp(-most, most).float().to(dtype)), (
        "the independent decoder agrees"
    )
    x = torch.cat([k, v], -1).flatten(0, 2).double()
    relative, least = ROUNDING[dtype]
    bound = steps / 2 * (1 + 2**-7) + exact.abs() * relative + least + exact.abs() * 2**-24
    miss = (x - decoded.flatten(0, 2).double()).abs()
    assert (miss <= bound).all()
    assert error == pytest.approx(float(miss.max()), rel=1e-6)
    groups = [g.double() for p in (k, v) for g in p.flatten(0, 2).split(32, -1)]
    most = torch.stack([g.abs().amax(-1) for g in groups], -1)
    spread = torch.stack([g.amax(-1) - g.amin(-1) for g in groups], -1) + most * 2**-7
    coarsest = (most / 127 if name == "int8" else spread / 15).amax(-1)
    assert (steps.amax(-1) <= coarsest * (1 + 2**-7) + 2**-126).all(), "no step is coarser than it must be"


@given(
    name=st.sampled_from(NAMES), k_dim=st.sampled_from([*DIMS, 5, 33]), v_dim=st.sampled_from([*DIMS, 6]),
    dtype=st.sampled_from(DTYPES), kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    tokens=st.integers(0, 3), piece=st.sampled_from([1, 600, 1 << 19]),
)  # fmt: skip
def test_every_value_is_within_the_bound(
    name: str, k_dim: int, v_dim: int, dtype: torch.dtype, kinds: tuple[str, str], tokens: int, piece: int
) -> None:
    torch.manual_seed(0)
    before, quantize.PIECE = quantize.PIECE, piece
    try:
        codec = Codec(name, k_dim, v_dim, dtype)
        k, v = make(kinds[0], dtype, 1, 2, tokens, k_dim), make(kinds[1], dtype, 1, 2, tokens, v_dim)
        rows = codec.encode(k, v)
        decoded = codec.decode(rows)
        error = codec.measure_error(k, v, rows)
    finally:
        quantize.PIECE = before
    assert rows.dtype == torch.uint8 and rows.shape == (1, 2, tokens, encoded_bytes(name, k_dim, v_dim))
    assert decoded.dtype == dtype and decoded.shape == (1, 2, tokens, k_dim + v_dim)
    if tokens == 0:
        assert error == 0
        return
    check(codec, k, v, rows, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_values_is_within_the_bound(name: str, dtype: torch.dtype, kind: str) -> None:
    codec = Codec(name, 80, 32, dtype)
    k, v = make(kind, dtype, 1, 2, 3, 80), make(kind, dtype, 1, 2, 3, 32)
    rows = codec.encode(k, v)
    check(codec, k, v, rows, codec.measure_error(k, v, rows))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(name: str, dtype: torch.dtype) -> None:
    codec = Codec(name, 40, 16, dtype)
    zeros = torch.zeros(1, 1, 2, 40, dtype=dtype)
    rows = codec.encode(zeros, zeros[..., :16])
    assert not codec.decode(rows).any()
    assert codec.measure_error(zeros, zeros[..., :16], rows) == 0


def test_the_largest_float16_does_not_become_infinite() -> None:
    most = torch.finfo(torch.float16).max
    for name in NAMES:
        codec = Codec(name, 32, 32, torch.float16)
        k = torch.linspace(-1, 1, 32).mul(most).half().expand(1, 1, 1, 32)
        assert codec.decode(codec.encode(k, -k)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_finite_spoils_its_own_group_only(name: str) -> None:
    codec = Codec(name, 64, 80, torch.float32)
    k, v = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 80)
    sound = codec.decode(codec.encode(k, v))
    for bad in (math.inf, -math.inf, math.nan):
        k[0, 1, 2, 40], v[0, 0, 0, 70] = bad, bad
        decoded = codec.decode(codec.encode(k, v))
        differs = decoded != sound
        differs[0, 1, 2, 32:64] = False
        differs[0, 0, 0, 64 + 64 : 64 + 80] = False
        assert not differs.any()
        assert decoded[0, 1, 2, 32:64].isnan().all(), "what was no number does not become one"
        assert decoded[0, 0, 0, 64 + 64 :].isnan().all()
        assert math.isfinite(codec.measure_error(k, v, codec.encode(k, v)))


@pytest.mark.parametrize("name", NAMES)
def test_rows_live_as_rows_do(name: str) -> None:
    codec = Codec(name, 16, 24, torch.bfloat16)
    k, v = torch.randn(2, 3, 9, 16).bfloat16(), torch.randn(2, 3, 9, 24).bfloat16()
    whole = codec.encode(k, v)
    store = Rows(Ledger("host"), device=torch.device("cpu"))
    for token in range(9):
        store.append(codec.encode(k[:, :, token : token + 1], v[:, :, token : token + 1]))
    assert torch.equal(store.view(), whole), "a row needs nothing but itself"
    assert not store.view().is_contiguous()
    decoded = codec.decode(whole)
    assert torch.equal(codec.decode(store.view()), decoded)
    positions = torch.randint(9, (2, 3, 4))
    picked = codec.decode(gather_rows(whole, positions))
    assert torch.equal(picked, gather_rows(decoded, positions))
    assert torch.equal(codec.decode(whole[1, 2, 3]), decoded[1, 2, 3]), "one row alone"
    assert torch.equal(codec.decode(whole.flatten(0, 2)), decoded.flatten(0, 2))
    # Bytes at an odd place, as in a file.
    shifted = torch.empty(whole.numel() + 1, dtype=torch.uint8)[1:].view_as(whole).copy_(whole)
    assert torch.equal(codec.decode(shifted), decoded)


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name: str) -> None:
    codec = Codec(name, 40, 32, torch.float32)
    k, v = torch.randn(2, 5, 3, 40).transpose(1, 2), torch.randn(2, 3, 32, 5).mT
    assert torch.equal(codec.encode(k, v), codec.encode(k.contiguous(), v.contiguous()))


def test_encoding_leaves_its_input_alone() -> None:
    k = torch.randn(1, 1, 4, 32)
    before = k.clone()
    for name in NAMES:
        Codec(name, 32, 32, torch.float32).encode(k, k)
    assert torch.equal(k, before)


def test_equal_records_have_equal_bytes() -> None:
    k, v = torch.randn(1, 1, 2, 5), torch.randn(1, 1, 2, 6)
    # New memory is filled with ones here, so a byte that nobody writes would show.
    torch.use_deterministic_algorithms(True)
    try:
        rows = Codec("int8", 5, 6, torch.float32).encode(k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not rows[..., 11].any()


def test_sizes_are_known_before_any_tensor() -> None:
    assert encoded_bytes("int8", 128, 128) == 256 + 16
    assert encoded_bytes("int4", 128, 128) == 128 + 32
    assert encoded_bytes("int8", 80, 80) == 160 + 12
    assert encoded_bytes("int8", 5, 6) == 12 + 4, "parameters start at an even byte"
    assert Codec("int4", 64, 8, torch.float16).row_bytes == encoded_bytes("int4", 64, 8) == 36 + 12
    assert hash(Codec("int4", 64, 8, torch.float16)) == hash(Codec("int4", 64, 8, torch.float16))


def test_unknown_forms_and_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of int8, int4, got 'int2'"):
        encoded_bytes("int2", 64, 64)
    with pytest.raises(ConfigError, match="expected one of int8, int4"):
        Codec("fp8", 64, 64, torch.float32)
    with pytest.raises(ConfigError, match=r"expected records of float32, bfloat16, float16, got torch.float64"):
        Codec("int8", 64, 64, torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_rounds_alike(name: str) -> None:
    codec = Codec(name, 80, 64, torch.bfloat16)
    k, v = torch.randn(1, 2, 7, 80).bfloat16(), torch.randn(1, 2, 7, 64).bfloat16()
    rows = codec.encode(k.cuda(), v.cuda())
    assert torch.equal(codec.decode(rows).cpu(), codec.decode(rows.cpu()))
    assert codec.measure_error(k, v, rows.cpu()) <= codec.measure_error(k, v, codec.encode(k, v)) * 1.01
