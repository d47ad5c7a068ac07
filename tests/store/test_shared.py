"""Caches of one handle share its limits: what is held or promised counts once, copies make room, all comes back."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError
from farkv.store.ledger import Ledger
from farkv.store.shared import Others, Shared


class Cache:
    """A cache's ledgers, and copies that it gives back."""

    def __init__(self, shared: Shared):
        self.shared = shared
        self.host = shared.open_ledger("host", shared.host.limit)
        self.near = shared.open_ledger("near", shared.near.limit)
        shared.add(self)

    def give_back(self, tier: str, n_bytes: int) -> None:
        ledger: Ledger = getattr(self, tier)
        n = min(n_bytes, ledger.copies)
        ledger.promise(ledger.promised - n, ledger.copies - n)


def test_what_is_promised_is_there_whatever_others_do() -> None:
    shared = Shared(host=100)
    one, two = Cache(shared), Cache(shared)
    one.host.promise(70)
    with pytest.raises(
        CapacityError, match=r"other caches of this model hold 70.*drop or reset\(\) those, raise --host"
    ):
        two.host.charge(40)
    two.host.charge(30)
    one.host.charge(70)
    assert shared.host.used == 100
    assert not one.host.has_room(1)
    one.host.release(70)
    assert shared.host.used == 100, "it may ask for them again"
    one.host.promise(0)
    assert shared.host.used == 30


def test_a_promise_that_does_not_fit_changes_nothing() -> None:
    shared = Shared(host=100)
    one, two = Cache(shared), Cache(shared)
    two.host.charge(50)
    one.host.promise(20)
    with pytest.raises(CapacityError):
        one.host.promise(60)
    assert (one.host.promised, shared.host.used) == (20, 70)


def test_a_dropped_cache_gives_its_bytes_back() -> None:
    shared = Shared(host=100, near=100)
    one = Cache(shared)
    one.host.charge(60)
    one.near.promise(70)
    one.near.charge(30)
    twin = copy.deepcopy(one.near)
    del one
    gc.collect()
    assert (shared.host.used, shared.near.used) == (0, 30)
    assert (twin.used, twin.promised) == (30, 0), "a copy asks for itself"
    del twin
    gc.collect()
    assert shared.near.used == 0


def test_a_copy_counts_once_more_or_is_refused() -> None:
    shared = Shared(host=100)
    one = Cache(shared)
    one.host.charge(40)
    twin = copy.deepcopy(one.host)
    assert (twin.used, shared.host.used) == (40, 80)
    with pytest.raises(CapacityError):
        copy.deepcopy(one.host)
    assert shared.host.used == 80


def test_copies_of_records_make_room_and_only_they() -> None:
    shared = Shared(host=100)
    one, two, three = (Cache(shared) for _ in range(3))
    one.host.promise(50, copies=30)
    two.host.promise(40, copies=10)
    assert shared.count_others(three, "host") == Others(held=50, copies=40, n_copying=2)
    shared.reclaim(three, "host", 35)
    # Of those who had most of them.
    assert (one.host.copies, two.host.copies) == (5, 10)
    three.host.promise(35)
    shared.reclaim(three, "host", 60)
    assert not three.host.has_room(51), "records stay"
    assert shared.count_others(three, "host") == Others(held=50)


def test_a_ledger_inside_another_counts_up_to_the_handle() -> None:
    shared = Shared(host=100)
    one = Cache(shared)
    near = Ledger("near", None, one.host)
    one.host.promise(50)
    near.charge(30)
    one.host.charge(20)
    assert (near.free, shared.host.used) == (50, 50)
    near.charge(10)
    assert shared.host.used == 60
    with pytest.raises(CapacityError):
        copy.deepcopy((one.host, near))
    near.release(20)
    one.host.promise(0)
    twin = copy.deepcopy((one.host, near))
    assert twin[1].parent is twin[0]
    assert (twin[0].used, twin[1].used, shared.host.used) == (40, 20, 80)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["charge", "release", "promise"]), st.integers(0, 60))))
def test_the_whole_counts_what_is_used_or_promised(moves: list[tuple[int, str, int]]) -> None:
    shared = Shared(host=100)
    caches = [Cache(shared) for _ in range(3)]
    for who, what, n in moves:
        ledger = caches[who].host
        free = ledger.free
        assert free is not None
        try:
            if what == "promise":
                ledger.promise(n)
            elif what == "charge":
                ledger.charge(n)
            else:
                ledger.release(min(n, ledger.used))
        except CapacityError:
            assert what == "promise" or n > free
        assert shared.host.used == sum(max(each.host.used, each.host.promised) for each in caches) <= 100


def test_threads_together_pass_no_limit() -> None:
    shared, refused = Shared(host=1000), []
    caches = [Cache(shared) for _ in range(4)]

    def take(ledger: Ledger) -> None:
        for _ in range(300):
            try:
                ledger.charge(7)
            except CapacityError:
                refused.append(1)
                ledger.release(ledger.used)

    threads = [threading.Thread(target=take, args=(each.host,)) for each in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.host.peak <= 1000
    assert refused
    assert shared.host.used == sum(each.host.used for each in caches)
