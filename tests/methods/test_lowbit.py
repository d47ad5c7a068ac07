"""Low-bit keys: what is chosen scores best by codes that are rounded a second time, in float64; and their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.math.index import fit_levels, measure_mean
from farkv.math.tables import decode_nibbles, encode_nibbles, level_tables
from farkv.methods import LowBit
from farkv.methods.lowbit import ColumnCoder
from farkv.store.sizes import count_cap
from tests.methods.replay_choice import Choice, divide, pool, record
from tests.models import forward, generate, make_model, make_prompt

FRACTION, TOKENS = 0.3, 90
IDS = make_prompt(2, tokens=TOKENS)["input_ids"]


def decode_plainly(seen: Choice, bits: int, fitted: list[int]) -> torch.Tensor:
    """Round every column with a step that was measured on the text's keys."""
    mean = seen.keys[fitted].mean(0)
    text = seen.keys[fitted] - mean
    if bits == 2:
        step = text.square().mean(0).sqrt() * 0.9957
        return (((seen.keys - mean) / step).floor().clamp(-2, 1) + 0.5) * step + mean
    step = text.abs().amax(0) / 7
    return ((seen.keys - mean) / step).round().clamp(-7, 7) * step + mean


@pytest.mark.parametrize(("bits", "pad", "near"), [(2, 0, None), (2, 19, "1MiB"), (4, 0, "1MiB"), (4, 19, None)])
def test_the_best_by_their_codes_are_read(bits: int, pad: int, near: str | None) -> None:
    prompt = make_prompt(2, tokens=TOKENS, pad=pad)
    for seen in record(make_model("llama"), LowBit(fraction=FRACTION, bits=bits), prompt, near):
        cap = count_cap(FRACTION, len(seen.real))
        assert len(seen.read) == cap
        always, scored = divide(seen.real, cap)
        assert always <= seen.read
        decoded = decode_plainly(seen, bits, [t for t in seen.real if t < TOKENS])
        worth = pool((seen.q @ decoded.T * seen.scaling)[:, scored])
        value = dict(zip(scored, worth.tolist(), strict=True))
        chosen = [value[t] for t in seen.read - always]
        left = [value[t] for t in set(scored) - seen.read]
        # Records with the same codes tie.
        assert min(chosen) >= max(left) - 1e-4, seen.where


@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_counted(bits: int) -> None:
    model = make_model("llama")
    with farkv.attach(model, LowBit(fraction=FRACTION, bits=bits)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        forward(model, IDS[:, :1], cache)
        receipt = far.receipt()
    store, cap = cache.engine.store, int(FRACTION * (TOKENS + 1))
    window = min(16, cap // 4 - min(4, cap // 8))
    assert receipt.read_fraction == pytest.approx(cap / (TOKENS + 1))
    assert receipt.index_fraction == pytest.approx((TOKENS - window) * 8 * bits / 8 / ((TOKENS + 1) * 64))
    assert store.index.used == sum(
        index.rows.n_bytes for index in (fit.index for fit in cache.engine.selector.fits.values())
    )
    assert not cache.account.fallbacks, "there is no skew to fall back from"
    assert cache.engine.selector.source is None


@pytest.mark.parametrize("bits", [2, 4])
def test_a_head_dimension_that_fills_no_byte(bits: int) -> None:
    model = make_model("qwen3", head_dim=6)
    with farkv.attach(model, LowBit(fraction=FRACTION, bits=bits)) as far:
        cache = far.new_cache()
        out = generate(model, make_prompt(2, tokens=50, pad=7), cache, n=4)
    assert all(logits.isfinite().all() for logits in out.logits)
    assert cache.engine.selector.fits[0].index.rows.width == {2: 2, 4: 3}[bits]


def test_steps_of_a_short_text_are_measured_again_as_it_grows() -> None:
    model = make_model("llama")
    with farkv.attach(model, LowBit(fraction=FRACTION)) as far:
        cache = far.new_cache()
        forward(model, IDS[:, :5], cache)
        fitted: list[int] = []
        for t in range(5, 24):
            forward(model, IDS[:, t : t + 1], cache)
            fitted.append(min(cache.engine.selector.fits[1].phase.fitted))
    assert fitted == sorted(fitted)
    assert fitted[0] == 5
    assert fitted[-1] >= 20
    assert len(set(fitted)) <= 4, "it doubles, it is not measured at every step"


def test_four_codes_share_a_byte() -> None:
    coder = ColumnCoder(2, torch.device("cpu"))
    size = coder.measure(8, 64)
    keys = torch.randn(2, 2, 9, 8)
    projection = coder.fit(0, None, keys, None, size)
    codes = coder.encode(keys, projection)
    assert codes.shape == (2, 2, 9, 2) and codes.dtype == torch.int8
    step = fit_levels(keys - projection.mean, None)
    levels = ((keys - projection.mean) / step).floor().clamp(-2, 1) + 0.5
    assert torch.allclose(coder.decode(codes, projection), levels * step)


def test_levels_lose_no_more_than_four_levels_must() -> None:
    # Of a normal variable 0.1188 of the variance is lost at best (Max 1960).
    values = torch.randn(1, 2, 20000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 30.0])
    values = torch.nn.functional.pad(values, (0, 1))
    tables = level_tables(fit_levels(values, None))
    values, decoded = values[..., :3], decode_nibbles(encode_nibbles(values, tables), tables, 4)[..., :3]
    lost: Any = (values - decoded).square().mean(2) / values.square().mean(2)
    assert (lost - 0.1188).abs().max() < 0.005


def test_padding_moves_neither_mean_nor_steps() -> None:
    keys = torch.randn(2, 2, 12, 3)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :5] = False
    spoilt = keys.clone()
    spoilt[0, :, :5] = 1e3
    assert torch.allclose(measure_mean(spoilt, valid)[0], keys[0, :, 5:].mean(1, keepdim=True), atol=1e-6)
    assert torch.allclose(fit_levels(spoilt, valid)[0], fit_levels(keys[:1, :, 5:], None)[0])
