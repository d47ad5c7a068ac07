"""Near mode moves exactly the rows that were asked for, and counts every byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farkv.kernels.native import load_native
from farkv.store.records import Needs, StoreLimits
from farkv.store.sizes import LayerShape, fetched_bytes
from farkv.store.tiers import Store
from farkv.store.whole import crop

B, HKV, D, DV = 2, 2, 4, 3
CPU = torch.device("cpu")
SHAPE = LayerShape(B, HKV, D, DV, 4)


def fill(near: int | None, tokens: int = 30, window: int = 3) -> tuple[Store, torch.Tensor, torch.Tensor, list[int]]:
    store = Store([0, 1], StoreLimits(near), CPU, Needs(window))
    moved: list[int] = []
    store.on_fetch = moved.append
    k, v = torch.randn(2, B, HKV, tokens, D), torch.randn(2, B, HKV, tokens, DV)
    for layer in (0, 1):
        store.append(layer, k[layer], v[layer])
    return store, k, v, moved


def pick(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rows.gather(2, positions[..., None].expand(-1, -1, -1, rows.shape[-1]))


def some(n: int, tokens: int) -> torch.Tensor:
    return torch.stack([torch.randperm(tokens)[:n].sort().values for _ in range(B * HKV)]).view(B, HKV, n)


@pytest.mark.parametrize("near", [None, 1 << 20])
@pytest.mark.parametrize("late", [0, 3])
def test_what_is_read_is_what_was_stored(near: int | None, late: int) -> None:
    store, k, v, moved = fill(near)
    for layer in (0, 1, 0):
        moved.clear()
        early = some(6, 20)
        more = 20 + some(late, 6)
        fetch = store.fetch(layer, early, None, late + 4)
        top_up = None if late == 0 else store.fetch(layer, more, None, 0)._replace(ticket=None, buffer=None)
        if late and near is not None:
            fetch = store.fetch(layer, early, None, late + 4)
            moved.clear()
            assert fetch.ticket is not None
            fetch.ticket.wait()
        read = store.read(layer, fetch, top_up, 4)
        assert torch.equal(read.positions[..., -4:], torch.arange(26, 30).expand(B, HKV, 4))
        assert torch.equal(read.k, pick(k[layer], read.positions))
        assert torch.equal(read.v, pick(v[layer], read.positions))
        assert read.valid is None


@pytest.mark.parametrize("mover", [None, load_native()])
@pytest.mark.parametrize("spare", [0, 3])
def test_rows_reach_a_buffer_directly_or_not(spare: int, mover: Any) -> None:
    store, k, v, moved = fill(1 << 20)
    store.pool[1].mover = mover
    fetch = store.fetch(1, some(6, 30), None, spare)
    assert fetch.ticket is not None
    assert fetch.buffer is not None
    fetch.ticket.wait()
    rows = fetch.buffer[:, :, :6]
    assert rows.is_contiguous() == (spare == 0)
    assert torch.equal(rows[..., :D], pick(k[1], fetch.positions))
    assert torch.equal(rows[..., D:], pick(v[1], fetch.positions))
    assert not fetch.buffer[:, :, 6:].any()
    assert moved == [fetched_bytes(SHAPE, 6)]


def test_fetched_bytes_are_those_of_the_formula() -> None:
    store, _, _, moved = fill(1 << 20)
    store.read(0, store.fetch(0, some(6, 20), None, 4), None, 4)
    assert sum(moved) == fetched_bytes(SHAPE, 6)
    moved.clear()
    valid = torch.zeros(B, HKV, 6, dtype=torch.bool)
    valid[..., :2] = True
    valid[0, 0, :5] = True
    store.read(0, store.fetch(0, some(6, 20), valid, 4), None, 4)
    assert sum(moved) == fetched_bytes(SHAPE, 5), "rows behind the longest valid run stay where they are"
    moved.clear()
    store.read(0, store.fetch(0, some(6, 20), valid & False, 4), None, 4)
    assert moved == []


def test_the_pool_is_near_memory_without_a_limit() -> None:
    store, k, _, moved = fill(None)
    with store.read_all(1) as (all_k, _):
        assert all_k.data_ptr() == store.pool[1].view().data_ptr()
        assert torch.equal(all_k, k[1])
    assert moved == []
    assert store.near.peak == 0


def test_a_dense_read_is_a_counted_copy() -> None:
    store, k, v, moved = fill(1 << 20)
    before = store.near.used
    with store.read_all(0) as (all_k, all_v):
        assert torch.equal(all_k, k[0])
        assert torch.equal(all_v, v[0])
        assert store.near.used == before + 30 * SHAPE.token_bytes
    assert store.near.used == before
    assert moved == [30 * SHAPE.token_bytes]


def test_crop_select_and_clear_keep_reads_right() -> None:
    store, k, v, _ = fill(1 << 20)
    order = torch.tensor([1, 0])
    for layer in (0, 1):
        crop(store, layer, 5)
        store.select(layer, order)
        positions = some(5, 20)
        read = store.read(layer, store.fetch(layer, positions, None, 4), None, 4)
        assert torch.equal(read.positions[..., -1], torch.full((B, HKV), 24))
        assert torch.equal(read.k, pick(k[layer][order], read.positions))
        assert torch.equal(read.v, pick(v[layer][order], read.positions))
    for layer in (0, 1):
        store.clear(layer)
    assert store.near.used == store.host.used == 0
