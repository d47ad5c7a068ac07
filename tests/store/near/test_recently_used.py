"""The recently used set: the link carries what was chosen less what is near, and what is read is what was stored."""

from __future__ import annotations

import copy

import pytest
import torch

from farkv.engine import bytes_recent
from farkv.errors import StoreError
from farkv.store.ledger import Ledger
from farkv.store.near.recently_used import RecentlyUsed, RecentSize
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Store
from farkv.store.whole import crop
from tests.engine.admitting import Gate
from tests.store.test_stateful import check_recently_used

HKV, D, DV, TOKENS = 2, 4, 3, 60
CPU = torch.device("cpu")
SHAPE = LayerShape(1, HKV, D, DV, 4)
ROW = SHAPE.record_bytes
# The announced context: what is stored, and a pass of a few tokens.
ROOM = TOKENS + 4


def fill(
    slots: int, *, batch: int = 1, host: int | None = None, evicts: bool = False, layers: tuple[int, ...] = (0,)
) -> tuple[Store, dict[int, torch.Tensor], list[int]]:
    """Return a store whose near limit leaves room for `slots` copies of every head, its rows, and what it moves."""
    shape = SHAPE._replace(batch=batch)
    store = Store(list(layers), StoreLimits(0, host, reserve_tokens=ROOM), CPU, Needs(2, evicts=evicts))
    need = Gate(store, 16).count_near(shape, ROOM)
    store.near.limit = need.total + slots * len(layers) * shape.token_bytes + 2
    moved: list[int] = []
    store.on_fetch = moved.append
    rows = {layer: torch.randn(batch, HKV, TOKENS, D + DV) for layer in layers}
    for layer in layers:
        store.append(layer, rows[layer][..., :D], rows[layer][..., D:])
    step(store, shape)
    return store, rows, moved


def step(store: Store, shape: LayerShape = SHAPE, n_new: int = 1, *, spare: int = 0) -> None:
    """Admit a pass of the announced context, for which `spare` near bytes are needed besides."""
    Gate(store, 16, spare=spare).admit(shape, n_new)


def read(store: Store, rows: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None = None) -> None:
    """Fetch and read records of the first layer; what comes is what was stored."""
    out = store.read(0, store.fetch(0, positions, valid, 2), None, 2)
    got, want = torch.cat([out.k, out.v], -1), rows.gather(2, out.positions[..., None].expand(-1, -1, -1, D + DV))
    known = torch.ones_like(out.positions, dtype=torch.bool) if out.valid is None else out.valid
    assert torch.equal(got[known], want[known])


def pick(*heads: list[int]) -> torch.Tensor:
    return torch.tensor(heads)[None]


def test_only_what_is_not_near_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytes_recent, "LEAST_SLOTS", 8)
    store, rows, moved = fill(8)
    assert store.recently_used[0].size.slots == 8
    asked = [
        # Positions of both heads, and how many of them must cross.
        (pick([1, 2, 3, 4], [11, 12, 13, 14]), 8),
        (pick([1, 2, 3, 4], [11, 12, 13, 14]), 0),
        (pick([1, 2, 5, 6], [11, 12, 13, 15]), 3),
        (pick([1, 2, 7, 8], [21, 22, 23, 24]), 6),
        # The first head has 1 to 8. Of the other one's nine 14 went, which was longest unread.
        (pick([5, 6, 7, 8], [11, 12, 13, 15]), 0),
        (pick([3, 4, 5, 6], [14, 21, 22, 23]), 1),
        # And now 24.
        (pick([9, 1, 2, 3], [24, 11, 12, 13]), 2),
    ]
    for positions, n_missing in asked:
        moved.clear()
        read(store, rows[0], positions)
        assert sum(moved) == n_missing * ROW
        check_recently_used(store)


def test_the_longest_unread_goes_first() -> None:
    store, rows, moved = fill(16)
    for first in (0, 8, 0, 16):
        read(store, rows[0], torch.arange(first, first + 8).expand(1, HKV, 8))
    moved.clear()
    read(store, rows[0], torch.arange(0, 8).expand(1, HKV, 8))
    assert moved == []
    read(store, rows[0], torch.arange(8, 16).expand(1, HKV, 8))
    assert sum(moved) == HKV * 8 * ROW


def test_a_recently_used_set_smaller_than_a_fetch_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytes_recent, "LEAST_SLOTS", 1)
    store, rows, moved = fill(5)
    positions = torch.arange(12).expand(1, HKV, 12)
    for n_missing in (12, 7, 7):
        moved.clear()
        read(store, rows[0], positions)
        assert sum(moved) == HKV * n_missing * ROW


def test_what_is_not_valid_neither_crosses_nor_enters() -> None:
    store, rows, moved = fill(16)
    positions = pick([1, 2, 3, 4], [11, 12, 13, 14])
    valid = torch.tensor([[[True, True, False, False], [True, True, True, False]]])
    read(store, rows[0], positions, valid)
    assert sum(moved) == 5 * ROW
    moved.clear()
    read(store, rows[0], positions)
    assert sum(moved) == 3 * ROW


def test_a_late_top_up_is_found_too() -> None:
    store, rows, moved = fill(16)
    early, late = pick([1, 2], [3, 4]), pick([5, 6], [7, 8])
    for n_missing in (8, 0):
        moved.clear()
        top_up = store.fetch(0, late, None, 0)._replace(ticket=None)
        fetch = store.fetch(0, early, None, 4)
        out = store.read(0, fetch, top_up, 2)
        want = rows[0].gather(2, out.positions[..., None].expand(-1, -1, -1, D + DV))
        assert torch.equal(torch.cat([out.k, out.v], -1), want)
        assert sum(moved) == n_missing * ROW


def test_records_that_come_after_a_crop_are_others() -> None:
    store, rows, moved = fill(16)
    read(store, rows[0], pick([1, 50, 51, 52], [2, 50, 51, 52]))
    crop(store, 0, 12)
    new = torch.randn(1, HKV, 12, D + DV)
    store.append(0, new[..., :D], new[..., D:])
    rows[0] = torch.cat([rows[0][:, :, :48], new], 2)
    moved.clear()
    read(store, rows[0], pick([1, 50, 51, 52], [2, 50, 51, 52]))
    assert sum(moved) == 6 * ROW


def test_recently_used_records_are_followed_through_an_eviction() -> None:
    store, rows, moved = fill(16, evicts=True)
    read(store, rows[0], pick([1, 30, 31, 32], [2, 30, 31, 33]))
    kept = torch.arange(20, TOKENS).expand(1, HKV, -1)
    store.evict(0, Keep(kept, torch.zeros(kept.shape), 10))
    rows[0] = rows[0][:, :, 20:]
    check_recently_used(store)
    moved.clear()
    read(store, rows[0], pick([10, 11, 12, 1], [10, 11, 13, 2]))
    assert sum(moved) == 2 * ROW


def test_beams_take_their_recently_used_records_along() -> None:
    store, rows, moved = fill(16, batch=3)
    positions = torch.stack([torch.arange(8 * i, 8 * i + 8).expand(HKV, 8) for i in range(3)])
    read(store, rows[0], positions)
    order = torch.tensor([2, 0, 0])
    store.select(0, order)
    rows[0] = rows[0][order]
    moved.clear()
    read(store, rows[0], positions[order])
    check_recently_used(store)
    # The newest two records come from the pool after a reordering.
    assert sum(moved) == 3 * HKV * 2 * ROW
    store.select(0, torch.tensor([0, 1]))
    assert store.recently_used == {}


def test_a_copy_of_a_cache_begins_without_copies_of_records() -> None:
    store, rows, moved = fill(16)
    read(store, rows[0], pick([1, 2], [3, 4]))
    twin = copy.deepcopy(store)
    assert not twin.recently_used
    assert twin.near.used == store.near.used - store.recently_used[0].rows.n_bytes
    assert twin.home.used == store.home.used - store.recently_used[0].size.metadata_bytes
    read(twin, rows[0], torch.arange(10, 26).expand(1, HKV, 16))
    moved.clear()
    read(store, rows[0], pick([1, 2], [3, 4]))
    assert moved == []
    check_recently_used(store)


def test_a_set_that_another_cache_took_the_memory_of_is_fetched_past() -> None:
    store, rows, moved = fill(16)
    read(store, rows[0], pick([1, 2], [3, 4]))
    store.give_back("near", 1)
    assert not store.recently_used
    moved.clear()
    read(store, rows[0], pick([1, 2], [3, 4]))
    assert sum(moved) > 0


def test_a_dense_pass_does_not_disturb_it() -> None:
    store, rows, moved = fill(30)
    read(store, rows[0], pick([1, 2], [3, 4]))
    before = copy.deepcopy((store.recently_used[0].owner, store.recently_used[0].last_read))
    for _, k, _v in store.read_blocks(0, 4):
        assert k.shape[2] == 4
    assert torch.equal(store.recently_used[0].owner, before[0])
    assert torch.equal(store.recently_used[0].last_read, before[1])
    moved.clear()
    read(store, rows[0], pick([1, 2], [3, 4]))
    assert moved == []


def test_a_fetch_that_fails_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows, _ = fill(16)
    read(store, rows[0], pick([1, 2], [3, 4]))

    def fail(*_: object) -> None:
        raise StoreError("page 7 is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(store.pool[0], "take", fail)
        fetch = store.fetch(0, pick([1, 9], [3, 9]), None, 2)
        assert fetch.ticket is not None
        with pytest.raises(StoreError, match="page 7"):
            fetch.ticket.wait()
    check_recently_used(store)
    read(store, rows[0], pick([1, 9], [3, 9]))


# --- the set itself -----------------------------------------------------------------------------------------


def make(slots: int, records: int = 50) -> RecentlyUsed:
    return RecentlyUsed(Ledger("near"), CPU, Ledger("host"), RecentSize(1, 1, slots, records, 2, torch.float32))


def test_it_follows_the_plain_twin() -> None:
    """A list of records by when they were read last is all there is to it."""
    draw = torch.Generator().manual_seed(3)
    recent, pool = make(9), torch.randn(1, 50, 2)
    ages: dict[int, int] = {}
    for now in range(200):
        n = int(torch.randint(1, 9, (1,), generator=draw))
        positions = torch.rand(1, 50, generator=draw).mul(torch.linspace(1, 2, 50)).argsort(-1)[:, :n]
        wanted = recent.find(positions, None)
        missing, asked = positions[wanted.missing].tolist(), positions[0].tolist()
        assert set(missing) == set(asked) - set(ages)
        recent.take_in(wanted, pool[0, missing])
        out = torch.zeros(1, 1, n, 2)
        recent.read(wanted, out)
        assert torch.equal(out[0, 0], pool[0, asked])
        owners = set(recent.owner[0][recent.owner[0] >= 0].tolist())
        assert set(asked) <= owners
        assert len(owners) == min(9, len(set(asked) | set(ages)))
        # Those that were read together are of one age: which of them goes is the set's own choice.
        gone, stayed = ([ages[i] for i in part] for part in (set(ages) - owners, owners - set(asked)))
        assert max(gone, default=-1) <= min(stayed, default=now)
        ages = {i: ages[i] for i in owners - set(asked)} | dict.fromkeys(asked, now)


def test_its_bytes_are_those_of_the_formula() -> None:
    recent = make(9)
    near, home = recent.rows.ledger, recent.home
    assert near.used == recent.size.near_bytes == 9 * 2 * 4
    assert home.used == recent.size.metadata_bytes == sum(t.numel() * t.element_size() for t in recent.metadata)
    recent.clear()
    assert near.used == home.used == 0
