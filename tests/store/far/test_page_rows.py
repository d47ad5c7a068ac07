"""Records on disk: full pages in a file, the newest rows in memory, and nothing lost when either has no room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farkv.errors import CapacityError, ConfigError, StoreError
from farkv.kernels.native import load_native
from farkv.store.far import pages as pages_module
from farkv.store.far.eviction import POLICIES, make_policy
from farkv.store.far.page_cache import PageCache
from farkv.store.far.page_file import DiskSpace
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.pages import NumberedPages, PageForm
from farkv.store.ledger import Ledger
from farkv.store.records import Needs, StoreLimits
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Store

B, HEADS, T = 2, 2, 8
FORM = PageForm(T, 5, torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def space(tmp_path: Path) -> Iterator[DiskSpace]:
    with DiskSpace(tmp_path / "disk", 200 * FORM.n_bytes) as space:
        yield space


def make(space: DiskSpace, room: int = 6, policy: str = "lru", host: int | None = None) -> PagedRows:
    ledger, pages = Ledger("host", host), NumberedPages(FORM, space.open_file(FORM.n_bytes))
    # Plain operations are in test_page_cache.py.
    pages.use(load_native())
    cache = PageCache(ledger, make_policy(policy), pages, load_native())
    cache.resize(room, 4)
    return PagedRows(ledger, cache)


def some(n: int, batch: int = B) -> torch.Tensor:
    return torch.randn(batch, HEADS, n, FORM.width)


def add(rows: PagedRows, new: torch.Tensor) -> None:
    rows.append(new[..., :2], new[..., 2:])


def take(rows: PagedRows, positions: torch.Tensor) -> torch.Tensor:
    """Return rows by position, [heads, n] -> [heads, n, W]."""
    heads = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
    out = torch.full((positions.numel(), FORM.width), torch.nan)
    rows.take(heads, positions.reshape(-1), out)
    return out.view(*positions.shape, -1)


def check(rows: PagedRows, model: torch.Tensor, others: int = 0) -> None:
    """All rows, any slice and any choice are as in the model, and all bytes are counted."""
    batch, heads, n, _ = model.shape
    assert rows.length == n
    assert rows.heads == (batch, heads)
    assert torch.equal(rows.read(0, n), model)
    whole = torch.full_like(model, torch.nan)
    rows.copy_to(whole)
    assert torch.equal(whole, model)
    for start, stop in ((0, 0), (n, n), (n // 2, n // 2), (n // 3, n), (0, n // 2), (n // 3, 2 * n // 3)):
        assert torch.equal(rows.read(start, stop), model[:, :, start:stop])
    if n:
        positions = torch.randint(n, (batch * heads, 7))
        flat = model.reshape(batch * heads, n, -1)
        assert torch.equal(take(rows, positions), flat.gather(1, positions[..., None].expand(-1, -1, FORM.width)))
    assert rows.page_cache.ledger.used == rows.n_bytes + rows.page_cache.n_bytes
    file = rows.pages.file
    assert file is not None
    assert file._ledger.used == (file.n_pages + others) * FORM.n_bytes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunks", [[1] * 20, [8, 8, 8], [30, 1, 1], [7, 1, 17, 40, 3], [100]])
def test_rows_of_any_chunks(space: DiskSpace, chunks: list[int], policy: str) -> None:
    rows, model = make(space, policy=policy), some(0)
    for n in chunks:
        new = some(n)
        add(rows, new)
        model = torch.cat([model, new], 2)
        check(rows, model)
        assert rows.n_written == model.shape[2] // T * T, "full pages are on disk"


def test_pages_of_one_head_lie_together(space: DiskSpace) -> None:
    rows = make(space)
    add(rows, some(3 * T + 2))
    assert rows.table.view()[..., 0].reshape(B * HEADS, 3).tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)]
    assert rows.pages.file is not None
    assert rows.open.length == 2


def test_copies_of_new_pages_are_kept_while_there_is_room(space: DiskSpace) -> None:
    rows = make(space, room=6)
    add(rows, some(T))
    assert rows.resident().all()
    add(rows, some(T))
    resident = rows.resident()
    assert resident.shape == (B, HEADS, 2)
    assert resident[..., 0].all()
    assert int(resident[..., 1].sum()) == 2
    told: list[int] = []
    rows.pages.on_read = told.append
    head = int((~resident[..., 1]).reshape(-1).nonzero()[0, 0])
    rows.take(torch.tensor([head]), torch.tensor([T + 3]), torch.empty(1, FORM.width))
    assert told == [FORM.n_bytes], "a page without a copy is read, and then has one"
    rows.take(torch.tensor([head]), torch.tensor([T + 4]), torch.empty(1, FORM.width))
    assert told == [FORM.n_bytes]


def test_a_dense_read_brings_no_copies_and_reads_what_has_none(space: DiskSpace) -> None:
    rows = make(space, room=3)
    model = some(5 * T)
    add(rows, model)
    before = rows.resident().clone()
    told: list[int] = []
    rows.pages.on_read = told.append
    assert torch.equal(rows.read(0, 5 * T), model)
    assert torch.equal(rows.resident(), before)
    assert sum(told) == int((~before).sum()) * FORM.n_bytes


@pytest.mark.parametrize("left", [0, 1, T - 1, T, T + 1, 2 * T, 3 * T - 1, 3 * T, 3 * T + 2, 3 * T + 5])
def test_crop_into_full_pages_and_go_on(space: DiskSpace, left: int) -> None:
    rows, model = make(space, room=2), some(3 * T + 5)
    add(rows, model)
    rows.cut(left)
    model = model[:, :, :left]
    check(rows, model)
    for n in (1, T, 3):
        new = some(n)
        add(rows, new)
        model = torch.cat([model, new], 2)
        check(rows, model)
    rows.cut(0)
    assert rows.length == 0
    add(rows, model)
    check(rows, model)


@pytest.mark.parametrize("n", [3, 3 * T, 2 * T + 3])
def test_beams_share_full_pages_and_part_in_the_open_one(space: DiskSpace, n: int) -> None:
    rows, model = make(space), some(n)
    add(rows, model)
    assert rows.pages.file is not None
    n_pages = rows.pages.file.n_pages
    for order in ([1, 0], [0, 0], [0, 1, 1, 0], [3, 2, 1, 0], [2]):
        rows.select(torch.tensor(order))
        model = model[order]
        check(rows, model)
        assert rows.pages.file.n_pages == n_pages
    for order in ([0, 0, 0], [2, 0, 1]):
        rows.select(torch.tensor(order))
        model = model[order]
        new = some(T + 1, len(order))
        add(rows, new)
        model = torch.cat([model, new], 2)
        check(rows, model)


def test_more_sequences_take_the_room_of_copies(space: DiskSpace) -> None:
    rows = make(space, room=40)
    rows.ledger.roomy = False
    model = some(6 * T + 5)
    for part in model.split(T, 2):
        add(rows, part)
    take(rows, torch.arange(6 * T).expand(B * HEADS, -1))
    assert rows.page_cache.used > 15
    rows.ledger.limit = rows.ledger.used + FORM.n_bytes
    rows.select(torch.tensor([0, 1, 0, 1]))
    check(rows, model[[0, 1, 0, 1]])


def test_a_disk_without_room_loses_nothing(tmp_path: Path) -> None:
    with DiskSpace(tmp_path, 10 * FORM.n_bytes) as space:
        rows, model = make(space), some(2 * T + 5)
        add(rows, model)
        other = space.open_file(FORM.n_bytes)
        other.write(torch.zeros(2, T, FORM.width))
        with pytest.raises(CapacityError, match="disk limit"):
            add(rows, some(3))
        check(rows, model, 2)
        with pytest.raises(CapacityError, match="disk limit"):
            add(rows, some(5 * T))
        check(rows, model, 2)
        short = some(2)
        add(rows, short)
        model = torch.cat([model, short], 2)
        check(rows, model, 2)
        space.ledger.limit = 14 * FORM.n_bytes
        more = some(4)
        add(rows, more)
        check(rows, torch.cat([model, more], 2), 2)


def test_a_disk_that_fails_half_way_loses_nothing(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = make(space), some(T + 5)
    add(rows, model)
    write = os.pwrite

    def tear(fd: int, data: Any, at: int) -> int:
        if at % FORM.n_bytes:
            raise OSError(28, "No space left on device")
        return write(fd, data[: FORM.n_bytes // 2], at)

    monkeypatch.setattr("farkv.store.far.page_file.os.pwrite", tear)
    with pytest.raises(StoreError, match="cannot be written"):
        add(rows, some(T))
    monkeypatch.undo()
    check(rows, model)
    more = some(2 * T)
    add(rows, more)
    check(rows, torch.cat([model, more], 2))


@pytest.mark.parametrize("spare", range(0, 1200, 40))
def test_a_host_without_room_loses_nothing(space: DiskSpace, spare: int) -> None:
    # Wherever in a write the limit strikes: either all of it is done, or nothing.
    rows, model = make(space, room=0), some(T + 5)
    add(rows, model)
    rows.ledger.limit = rows.ledger.used + spare
    rows.ledger.roomy = False
    new = some(2 * T)
    try:
        add(rows, new)
        model = torch.cat([model, new], 2)
    except CapacityError as error:
        assert "host limit" in str(error)
    rows.ledger.limit = None
    check(rows, model)
    rows.ledger.limit = rows.ledger.used + spare // 4
    try:
        rows.cut(3)
        model = model[:, :, :3]
    except CapacityError as error:
        assert "host limit" in str(error)
    rows.ledger.limit = None
    check(rows, model)


def test_records_of_another_shape_are_refused(space: DiskSpace) -> None:
    rows = make(space)
    with pytest.raises(ConfigError, match="5 elements"):
        rows.append(torch.zeros(B, HEADS, T, 5), torch.zeros(B, HEADS, T, 5))
    with pytest.raises(ConfigError, match="float32"):
        rows.append(torch.zeros(B, HEADS, T, 5, dtype=torch.float64))
    assert rows.length == 0
    add(rows, some(3))


def test_zero_rows(space: DiskSpace) -> None:
    rows = make(space)
    assert rows.heads == (0, 0)
    assert rows.resident().shape == (0, 0, 0)
    rows.cut(0)
    rows.clear()
    rows.select(torch.tensor([0, 1]))
    model = some(T)
    add(rows, model)
    check(rows, model)
    rows.take(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, FORM.width))


# --- through the tiers --------------------------------------------------------------------------------------


def open_store(space: DiskSpace, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> Store:
    monkeypatch.setattr(pages_module, "PAGE_BYTES", T * 5 * 4)
    store = Store([0, 1], StoreLimits(disk=space, **limits), CPU, Needs(2))
    store.open_pages(LayerShape(B, HEADS, 2, 3, 4), torch.float32)
    return store


def test_a_damaged_page_is_an_error_and_never_wrong_rows(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(space, monkeypatch)
    model = some(3 * T + 2)
    store.append(0, model[..., :2], model[..., 2:])
    assert store.page_cache is not None
    file = store.page_cache.pages.file
    assert file is not None
    bad = 4
    # Head 1, second page: the third and fourth numbers of a head are its own.
    os.pwrite(file._fd, b"\x7f\x7f", bad * file.page_bytes + 11)
    good, hit = torch.arange(8), torch.arange(T, T + 4)
    positions = good.expand(B, HEADS, 8)
    read = store.read(0, store.fetch(0, positions, None, 3), None, 3)
    assert torch.equal(torch.cat([read.k, read.v], -1)[:, :, :8], model[:, :, :8])
    with pytest.raises(StoreError, match=f"page {bad} is damaged"):
        store.read(0, store.fetch(0, hit.expand(B, HEADS, 4), None, 3), None, 3)
    late = store.fetch(0, hit.expand(B, HEADS, 4), None, 0)._replace(ticket=None, buffer=None)
    with pytest.raises(StoreError, match=f"page {bad} is damaged"):
        store.read(0, store.fetch(0, positions, None, 7), late, 3)
    with pytest.raises(StoreError, match=f"page {bad} is damaged"):
        list(store.read_blocks(0, 3 * T))
    with pytest.raises(StoreError, match=f"page {bad} is damaged"), store.read_all(0):
        raise AssertionError
    valid = torch.ones(B, HEADS, 4, dtype=torch.bool)
    valid[0, 1] = False
    read = store.read(0, store.fetch(0, hit.expand(B, HEADS, 4), valid, 3), None, 3)
    rows = torch.cat([read.k, read.v], -1)
    assert torch.equal(rows[read.valid], model.gather(2, read.positions[..., None].expand(-1, -1, -1, 5))[read.valid])
    assert store.near.used == store.windows[0].data.numel() * 4 + sum(  # type: ignore[union-attr]
        0 if area is None else area.numel() * 4 for area in store.buffers._areas
    ), "a pass that failed gives back what it took"


SHAPE = LayerShape(B, HEADS, 2, 3, 4)


def test_a_cleared_store_gives_its_disk_back(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(space, monkeypatch)
    for _ in range(3):
        store.open_pages(SHAPE, torch.float32)
        for layer in (0, 1):
            store.append(layer, torch.zeros(B, HEADS, 2 * T, 2), torch.zeros(B, HEADS, 2 * T, 3))
        assert space.ledger.used == store.disk_bytes == 2 * 4 * 2 * T * 5 * 4
        for layer in (0, 1):
            store.clear(layer)
        assert store.host.used == store.near.used == 0
