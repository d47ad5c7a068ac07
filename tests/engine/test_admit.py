"""Admission at work on a store: what it refuses, and what is allocated, held and counted after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from farkv.engine import bytes_recent
from farkv.errors import CapacityError
from farkv.store.far.page_file import DiskSpace
from farkv.store.records import Needs, StoreLimits
from farkv.store.tiers import Store
from farkv.store.whole import crop
from tests.engine.admitting import Gate
from tests.store.far.test_page_rows import HEADS, B, T, open_store, some
from tests.store.far.test_page_rows import SHAPE as PAGED
from tests.store.near.test_recently_used import CPU, DV, HKV, ROOM, ROW, SHAPE, TOKENS, D, fill, pick, read, step
from tests.store.test_stateful import count_host, count_near


def test_admit_refuses_before_anything_is_stored() -> None:
    store = Store([0, 1], StoreLimits(host=2000), CPU, Needs(1))
    # Of one layer as many records as a step reads are gathered.
    fits = (2000 - 4 * SHAPE.token_bytes) // (2 * SHAPE.token_bytes)
    with pytest.raises(CapacityError, match="host limit"):
        Gate(store, 4).admit(SHAPE, fits + 1)
    Gate(store, 4).admit(SHAPE, fits)
    near = Store([0, 1], StoreLimits(near=1, host=2000), CPU, Needs(1))
    near.near.limit = Gate(near, 4).count_near(SHAPE, fits).total
    with pytest.raises(CapacityError, match=r"near limit.*prefill [1-9]"):
        Gate(near, 4).admit(SHAPE, fits)
    near.near.limit += 3 * fits * SHAPE.token_bytes
    Gate(near, 4).admit(SHAPE, fits)
    assert store.host.used == near.host.used == near.near.used == 0


# --- over a disk --------------------------------------------------------------------------------------------


def test_disk_is_admitted_for_what_is_held_not_for_what_was_ever_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = T * 5 * 4
    with DiskSpace(tmp_path, 2 * 4 * 5 * page) as space:
        store = open_store(space, monkeypatch)
        Gate(store, 1).admit(PAGED, 5 * T + 7)
        with pytest.raises(CapacityError, match="disk limit"):
            Gate(store, 1).admit(PAGED, 6 * T)
        for layer in (0, 1):
            store.append(layer, torch.zeros(B, HEADS, 4 * T, 2), torch.zeros(B, HEADS, 4 * T, 3))
            crop(store, layer, 3 * T)
        Gate(store, 1).admit(PAGED, T)
        with pytest.raises(CapacityError, match="disk limit"):
            Gate(store, 1).admit(PAGED, 2 * T)


def test_copies_take_only_what_the_host_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, announced = T * 5 * 4, {"near": 1 << 20, "reserve_tokens": 9 * T}
    with DiskSpace(tmp_path, None) as space:
        small = open_store(space, monkeypatch, host=20 * page, **announced)
        with pytest.raises(CapacityError, match="host limit"):
            Gate(small, 1).admit(PAGED, 9 * T)
        store = open_store(space, monkeypatch, host=80 * page, **announced)
        Gate(store, 1).admit(PAGED, T)
        for _ in range(9):
            for layer in (0, 1):
                new = some(T)
                store.append(layer, new[..., :2], new[..., 2:])
        assert store.page_cache is not None
        assert 0 < store.page_cache.used <= store.page_cache.room < 72
        assert store.host.peak <= 80 * page


# --- recently used sets: what the near limit leaves ------------------------------------------------------------


def test_it_takes_what_is_left_and_no_more() -> None:
    store, _, _ = fill(20, layers=(0, 1))
    assert {each.size.slots for each in store.recently_used.values()} == {20}
    assert store.near.used == count_near(store)
    assert store.host.used == count_host(store)
    store.clear(0)
    store.clear(1)
    assert store.near.used == store.host.used == 0


def test_there_is_none_where_little_is_left() -> None:
    store, _, _ = fill(bytes_recent.LEAST_SLOTS - 1)
    assert store.recently_used == {}
    assert store.host.used == count_host(store)


def test_it_goes_where_a_pass_needs_the_memory_and_comes_back() -> None:
    store, rows, moved = fill(20)
    positions = pick([1, 2], [3, 4])
    read(store, rows[0], positions)
    step(store, spare=10 * SHAPE.token_bytes)
    assert store.recently_used == {}
    step(store)
    moved.clear()
    read(store, rows[0], positions)
    assert sum(moved) == 4 * ROW, "a new one begins cold"


def test_it_stays_where_a_pass_has_room_beside_it() -> None:
    store, rows, moved = fill(3 * ROOM)
    read(store, rows[0], pick([1, 2], [3, 4]))
    step(store, n_new=4)
    moved.clear()
    read(store, rows[0], pick([1, 2], [3, 4]))
    assert moved == []


@pytest.mark.parametrize(("spare_bytes", "n_layers"), [(0, 0), (2 * HKV * (4 * ROOM + 8 * 20), 2)])
def test_its_metadata_must_find_room_with_the_pool(spare_bytes: int, n_layers: int) -> None:
    host = 2 * ROOM * SHAPE.token_bytes
    store, _, _ = fill(20, host=host + spare_bytes, layers=(0, 1))
    assert len(store.recently_used) == n_layers
    assert store.host.peak <= host + spare_bytes


def test_it_is_off_where_a_plan_holds_records_near() -> None:
    store = Store([0], StoreLimits(1 << 20, reserve_tokens=ROOM), CPU, Needs(2, pins=True))
    new = torch.randn(1, HKV, TOKENS, D + DV)
    store.append(0, new[..., :D], new[..., D:])
    step(store)
    assert store.recently_used == {}


def test_a_context_longer_than_its_metadata_begins_anew() -> None:
    store, rows, _ = fill(20)
    read(store, rows[0], pick([1, 2], [3, 4]))
    store.limits = store.limits._replace(reserve_tokens=2 * ROOM)
    step(store)
    assert store.recently_used[0].size.records == 2 * ROOM
    assert (store.recently_used[0].owner == -1).all()
