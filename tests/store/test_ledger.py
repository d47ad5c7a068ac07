"""A ledger never passes its limit, and a refused charge changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError
from farkv.store.ledger import Ledger


@given(
    st.none() | st.integers(1, 1000),
    st.none() | st.integers(1, 1000),
    st.lists(st.tuples(st.sampled_from(["child", "parent"]), st.integers(0, 400), st.booleans()), max_size=40),
)
def test_ledgers_balance(own: int | None, above: int | None, moves: list[tuple[str, int, bool]]) -> None:
    parent = Ledger("near", above)
    ledgers = {"parent": parent, "child": Ledger("index", own, parent)}
    held = {"parent": 0, "child": 0}
    peak = dict(held)
    for name, size, give_back in moves:
        ledger = ledgers[name]
        before = [(b.used, b.peak) for b in ledgers.values()]
        if give_back:
            less = min(size, held[name])
            ledger.release(less)
            held[name] -= less
        else:
            fits = ledger.has_room(size)
            try:
                ledger.charge(size)
            except CapacityError as error:
                assert not fits
                assert [(b.used, b.peak) for b in ledgers.values()] == before
                assert "raise --" in str(error)
                continue
            assert fits
            held[name] += size
        used = {"child": held["child"], "parent": held["child"] + held["parent"]}
        peak = {n: max(peak[n], used[n]) for n in used}
        for n, b in ledgers.items():
            assert b.used == used[n]
            assert b.peak == peak[n]
            assert b.limit is None or b.peak <= b.limit


def test_the_refusal_names_need_limit_and_remedy() -> None:
    ledger = Ledger("host", 1000)
    ledger.charge(900)
    with pytest.raises(CapacityError, match=r"host limit: this step needs 1,100 bytes.*1,000.*--host to at least 1100"):
        ledger.charge(200)


def test_more_than_was_taken_cannot_be_given_back() -> None:
    ledger = Ledger("near")
    ledger.charge(5)
    with pytest.raises(AssertionError):
        ledger.release(6)
