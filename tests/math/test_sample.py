"""Samples are of a sequence's own tokens: padding and the number of passes change nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.sample import extend_sample, thin_keys, thin_queries, widen_stride

MOST = 8


def numbers(lengths: list[int], pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows that say which of their sequence's tokens they are (1, 2, ...; padding: -1), and which are real."""
    n = max(a + b for a, b in zip(lengths, pads, strict=True))
    own = torch.arange(n)[None] - torch.tensor([n - a for a in lengths])[:, None] + 1
    real = own > 0
    rows = torch.where(real, own, -1).float()
    return rows[:, None, :, None].expand(-1, 2, -1, 3), real


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_keys_are_evenly_spaced_over_the_sequences_own_tokens(lengths: list[int]) -> None:
    rows, real = numbers(lengths, [0] * len(lengths))
    sample, valid = thin_keys(rows, real, MOST)
    assert valid is not None
    for i, n in enumerate(lengths):
        alone, flags = thin_keys(torch.arange(1, n + 1).float()[None, None, :, None], None, MOST)
        assert flags is None
        assert sample[i, 0, :, 0][valid[i]].tolist() == alone.flatten().tolist()
        assert len(alone.flatten()) <= MOST
    assert (sample * ~valid[:, None, :, None]).abs().sum() == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 13))
def test_queries_are_the_same_in_one_pass_as_in_many(lengths: list[int], step: int) -> None:
    rows, real = numbers(lengths, [0] * len(lengths))
    sample, strides = None, [1] * len(lengths)
    seen = [0] * len(lengths)
    for start in range(0, rows.shape[2], step):
        now = real[:, start : start + step]
        total = [a + int(b) for a, b in zip(seen, now.sum(-1), strict=True)]
        wider = [widen_stride(s, n, MOST) for s, n in zip(strides, total, strict=True)]
        n_slots = max(1, *(-(-n // s) for n, s in zip(total, wider, strict=True)))
        tokens = torch.tensor([seen, total, strides, wider])
        sample = thin_queries(sample, rows[:, :, start : start + step], now, tokens, n_slots)
        seen, strides = total, wider
    assert sample is not None
    for i, n in enumerate(lengths):
        expected = list(range(1, n + 1, widen_stride(1, n, MOST)))
        got = sample[i, 1, :, 2].tolist()
        assert got[: len(expected)] == expected
        assert not any(got[len(expected) :])


def test_a_sample_grows_in_place_and_its_shorter_views_stay() -> None:
    q = torch.randn(2, 3, 9, 4)
    sample = q[:, :, :1].clone()
    views = [sample]
    for t in range(1, 9):
        sample = extend_sample(sample, q[:, :, t : t + 1], 9)
        views.append(sample)
    for n, view in enumerate(views, 1):
        assert torch.equal(view, q[:, :, :n])
    # From four on there was room for eight, so five to eight share memory; nine found none.
    assert views[4].data_ptr() == views[7].data_ptr() != views[8].data_ptr()
    # Steps that are taken back are written over.
    again = extend_sample(views[5], q[:, :, :1], 9)
    assert torch.equal(again[:, :, 6], q[:, :, 0])
