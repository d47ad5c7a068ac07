"""Shapes to bytes and counts: caps are caps, what is shared out is no more than there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farkv.store.sizes import Allowed, count_cap, count_forced, grow_capacity, share_out


@given(st.floats(0.001, 1.0), st.integers(1, 5000), st.integers(0, 64), st.integers(0, 64))
def test_the_cap_is_a_cap(fraction: float, tokens: int, sinks: int, window: int) -> None:
    cap = count_cap(fraction, tokens)
    assert 1 <= cap <= tokens
    assert cap == 1 or cap <= fraction * tokens + 1e-6
    forced = count_forced(cap, sinks, window, fraction)
    assert sum(forced) <= cap // 4
    assert forced[0] <= sinks
    assert forced[1] <= window


@given(st.integers(0, 4096), st.integers(1, 4096))
def test_capacity_grows_enough_and_not_much_more(capacity: int, need: int) -> None:
    grown = grow_capacity(capacity, need)
    assert grown >= need
    assert grown == capacity or grown <= need * 1.25 + 64


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 20), st.integers(0, 500))
def test_counts_are_shared_out_within_the_total(wanted: list[int], least: int, total: int) -> None:
    counts = share_out(wanted, least, total)
    assert sum(counts) <= max(total, least * len(wanted))
    assert all(least <= n <= max(w, least) for n, w in zip(counts, wanted, strict=True))
    asked = sum(max(w, least) for w in wanted)
    assert sum(counts) == min(asked, max(total, least * len(wanted))), "nothing is left over"
    for a, n in zip(wanted, counts, strict=True):
        for b, m in zip(wanted, counts, strict=True):
            assert a <= b or n >= m, "no layer ends below one that wanted less"
    cut = [n for n, w in zip(counts, wanted, strict=True) if n < max(w, least)]
    assert not cut or max(cut) >= max(counts) - 1, "the largest pay"


@given(st.integers(0, 100), st.floats(0, 1), st.integers(0, 5000))
def test_a_layer_may_keep_its_share_and_never_more_than_all(base: int, share: float, tokens: int) -> None:
    count = Allowed(base, share).count(tokens)
    assert 0 <= count <= tokens
    assert count == tokens or base + share * tokens - 1 < count <= base + share * tokens + 1e-6
    assert Allowed(0, 18 / 60).count(60) == 18, "binary rounding costs no record"
