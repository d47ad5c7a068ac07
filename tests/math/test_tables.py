"""Nibble tables: what codes tell of keys, against loops in float64; and that learning pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farkv.kernels.native import Native, list_native
from farkv.math.index import CODE_MAX
from farkv.math.tables import (
    decode_nibbles,
    encode_nibbles,
    learn_tables,
    level_tables,
    split_nibbles,
    step_tables,
    weigh_keys,
)

B, HKV = 2, 2


def draw(n: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(B, HKV, n, columns, generator=random) * torch.linspace(2, 0.3, columns)
    return keys, torch.rand(B, HKV, n, generator=random) + 0.1


def lose(keys: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor) -> float:
    """The weighted share of the keys that their codes miss."""
    told = decode_nibbles(encode_nibbles(keys, tables), tables, keys.shape[-1])
    missed = ((told - keys).double().square().sum(-1) * weights).sum()
    return float(missed / (keys.double().square().sum(-1) * weights).sum())


def test_a_key_is_the_sum_of_its_nibbles_entries() -> None:
    keys, weights = draw(40, 8)
    tables = learn_tables(keys, weights, 4, 4)
    codes = encode_nibbles(keys, tables)
    told, nibbles = decode_nibbles(codes, tables, 8), split_nibbles(codes)
    assert codes.shape == (B, HKV, 40, 2) and codes.dtype == torch.int8
    for b, h, t in [(0, 0, 3), (1, 1, 39)]:
        expected = torch.zeros(8, dtype=torch.float64)
        for i in range(4):
            entry = tables[b, h, 16 * i + int(nibbles[b, h, t, i])].double()
            expected[i % 2 * 4 : i % 2 * 4 + 4] += entry
        assert torch.allclose(told[b, h, t].double(), expected, atol=1e-5)


def test_each_nibble_takes_the_entry_nearest_to_what_is_left() -> None:
    keys, weights = draw(60, 8)
    tables = learn_tables(keys, weights, 4, 4)
    nibbles = split_nibbles(encode_nibbles(keys, tables))
    rest = keys.double().clone()
    for i in range(4):
        part = rest[..., i % 2 * 4 : i % 2 * 4 + 4]
        table = tables[:, :, 16 * i : 16 * i + 16].double()
        distance = (part[:, :, :, None] - table[:, :, None]).square().sum(-1)
        taken = distance.gather(-1, nibbles[..., i : i + 1])[..., 0]
        assert (taken <= distance.amin(-1) + 1e-5).all()
        part -= table.gather(2, nibbles[..., i : i + 1].expand(-1, -1, -1, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_even_steps_lose_half_a_step_and_of_two_nibbles_at_most_one(bits: int) -> None:
    keys, _ = draw(200, 6)
    scale = keys.abs().amax(2, keepdim=True) / CODE_MAX[bits]
    tables = step_tables(scale, bits)
    told = decode_nibbles(encode_nibbles(keys, tables), tables, 6)
    assert ((told - keys).abs() <= scale * (0.5001 if bits == 4 else 1.0001)).all()


def test_two_bits_are_four_levels() -> None:
    keys, _ = draw(50, 8)
    scale = torch.rand(B, HKV, 1, 8) + 0.5
    tables = level_tables(scale)
    expected = ((keys / scale).floor().clamp(-2, 1) + 0.5) * scale
    assert torch.allclose(decode_nibbles(encode_nibbles(keys, tables), tables, 8), expected, atol=1e-6)


def test_learned_tables_lose_less_than_even_steps_of_as_many_bits() -> None:
    keys, weights = draw(2000, 16)
    learned = learn_tables(keys, weights, 8, 8)
    steps = step_tables(keys[..., :8].abs().amax(2, keepdim=True) / 7, 4)
    told = torch.nn.functional.pad(decode_nibbles(encode_nibbles(keys[..., :8], steps), steps, 8), (0, 8))
    by_steps = float((told - keys).square().sum() / keys.square().sum())
    assert lose(keys, torch.ones_like(weights), learned) < by_steps


def test_weight_buys_precision() -> None:
    keys, _ = draw(1000, 8)
    heavy = torch.ones(B, HKV, 1000)
    heavy[..., :10] = 100
    first = keys[:, :, :10], torch.ones(B, HKV, 10)
    even, weighted = (learn_tables(keys, w, 4, 8) for w in (torch.ones_like(heavy), heavy))
    assert lose(*first, weighted) < 0.5 * lose(*first, even)


def test_what_is_told_worst_is_told_better_for_what_others_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 600, 16, generator=random) * torch.randn(1, 1, 600, 1, generator=random).exp()

    def find_worst() -> torch.Tensor:
        tables = learn_tables(keys, torch.ones(1, 1, 600), 8, 16)
        lost = (decode_nibbles(encode_nibbles(keys, tables), tables, 16) - keys)[0, 0].norm(dim=-1)
        return lost.topk(30).values.mean()

    ours = find_worst()
    monkeypatch.setattr("farkv.math.tables._weigh_rest", lambda rest: torch.ones(rest.shape[:-1]))
    assert ours < 0.8 * find_worst()


def test_padding_weighs_nothing() -> None:
    queries, keys = torch.randn(B, HKV, 20, 8), torch.randn(B, HKV, 30, 8)
    valid = torch.ones(B, 30, dtype=torch.bool)
    valid[0, :12] = False
    weights = weigh_keys(queries, keys, valid)
    alone = weigh_keys(queries[:1], keys[:1, :, 12:], None)
    assert (weights[0, :, :12] == 0).all()
    assert torch.allclose(weights[:1, :, 12:], alone, rtol=1e-5)


def test_few_keys_are_told_exactly() -> None:
    keys, weights = draw(5, 8)
    tables = learn_tables(keys, weights, 4, 8)
    assert torch.allclose(decode_nibbles(encode_nibbles(keys, tables), tables, 8), keys, atol=1e-5)


@pytest.mark.skipif(not list_native(), reason="the native library was not built")
@given(
    n=st.sampled_from([1, 3, 17, 300, 1030]), groups=st.integers(1, 5), width=st.sampled_from([1, 2, 3, 8, 16, 40]),
    stages=st.sampled_from([2, 4]), seed=st.integers(0, 999), isa=st.sampled_from(list_native() or ("none",)),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_native_twin(n: int, groups: int, width: int, stages: int, seed: int, isa: str) -> None:
    native, n_nibbles = Native(isa), groups * stages
    keys, weights = draw(n, groups * width, seed)
    ours, plain = native.learn_tables(keys, weights, n_nibbles, width), learn_tables(keys, weights, n_nibbles, width)
    # The same beginning and rounds; where two entries are as near, rounding decides.
    assert abs(lose(keys, weights, ours) - lose(keys, weights, plain)) < 0.02
    same = native.encode_nibbles(keys, plain) == encode_nibbles(keys, plain)
    told = [
        decode_nibbles(c, plain, keys.shape[-1])
        for c in (native.encode_nibbles(keys, plain), encode_nibbles(keys, plain))
    ]
    assert same.float().mean() > 0.99 or torch.allclose(*told, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_no_other_key(value: float) -> None:
    keys, weights = draw(100, 8)
    spoilt = keys.clone()
    spoilt[0, 0, 7, 3] = value
    tables = learn_tables(spoilt, weights, 4, 8)
    assert tables.isfinite().all()
    assert lose(keys, weights, tables) < 0.2
    if list_native():
        assert Native(list_native()[0]).learn_tables(spoilt, weights, 4, 8).isfinite().all()
