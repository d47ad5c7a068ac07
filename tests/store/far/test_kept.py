"""Eviction in the store: rows, places, scores and held copies stay together, and counts are shared out fairly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CacheStateError
from farkv.store.far import rows as rows_module
from farkv.store.far.kept import ROW_BYTES, Kept
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.tiers import Store
from farkv.store.whole import crop

B, HEADS, WIDTH = 2, 2, 3
CPU = torch.device("cpu")


def some(n: int, tokens: int) -> torch.Tensor:
    """Return `n` ascending positions per sequence and head."""
    return torch.stack([torch.randperm(tokens)[:n].sort().values for _ in range(B * HEADS)]).view(B, HEADS, n)


def pick(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rows.gather(2, positions[..., None].expand(-1, -1, -1, rows.shape[-1]))


@given(
    n=st.integers(1, 150), share=st.floats(0, 1), reserve=st.sampled_from([0, 20, 150]), tight=st.booleans(),
    piece=st.sampled_from([1, 7, 512]),
)  # fmt: skip
def test_kept_rows_equal_plain_indexing(n: int, share: float, reserve: int, tight: bool, piece: int) -> None:
    row = B * HEADS * WIDTH * 4
    before, rows_module.MOVE_ROWS = rows_module.MOVE_ROWS, piece
    try:
        ledger = Ledger("host", n * row if tight else None)
        ledger.roomy = not tight
        rows = Rows(ledger, device=CPU, reserve=0 if tight else reserve)
        data = torch.randn(B, HEADS, n, WIDTH)
        rows.append(data)
        positions = some(int(share * n), n)
        rows.keep(positions)
        assert rows.length == positions.shape[-1]
        assert torch.equal(rows.view(), pick(data, positions))
        assert ledger.used == rows.n_bytes
        assert not tight or ledger.peak <= n * row, "moved in place where there is no room"
        assert tight or rows.n_bytes <= max(rows.length, reserve) * row, "what is not needed is freed"
        more = torch.randn(B, HEADS, 3, WIDTH)
        if not tight:
            rows.append(more)
            assert torch.equal(rows.view(), torch.cat([pick(data, positions), more], 2))
    finally:
        rows_module.MOVE_ROWS = before


def test_places_and_scores_follow_every_operation() -> None:
    ledger = Ledger("host")
    kept = Kept(ledger, CPU)
    kept.append(torch.zeros(B, HEADS, 20, 1), 0)
    positions = some(8, 20)
    scores = torch.rand(B, HEADS, 8)
    kept.keep(positions, scores, 3)
    assert torch.equal(kept.places.view()[..., 0].long(), positions)
    assert torch.equal(kept.scores.view()[..., 0], scores.bfloat16())
    kept.append(torch.zeros(B, HEADS, 2, 1), 20)
    assert kept.gapless == 5
    kept.cut(6, evicted=12)
    assert torch.equal(kept.places.view()[..., 0].long(), positions[..., :6])
    with pytest.raises(CacheStateError, match="at most 1 tokens to take back, got 2"):
        kept.cut(4, evicted=12)
    kept.select(torch.tensor([1, 1, 0]))
    assert torch.equal(kept.places.view()[..., 0].long(), positions[[1, 1, 0], :, :6])
    assert ledger.used == kept.places.n_bytes + kept.scores.n_bytes
    assert ledger.used // (kept.places.data.shape[2] * 3 * HEADS) in (ROW_BYTES, ROW_BYTES - 1)  # type: ignore[union-attr]
    kept.clear()
    assert ledger.used == 0


def test_nothing_that_was_evicted_can_be_taken_back_but_all_else_can() -> None:
    kept = Kept(Ledger("host"), CPU)
    kept.append(torch.zeros(B, HEADS, 20, 1), 0)
    kept.cut(0, evicted=0)
    assert kept.places.length == 0


def test_an_evicted_layer_reads_and_locates_what_is_left() -> None:
    store = Store([0], StoreLimits(near=1 << 20), CPU, Needs(2, evicts=True, pins=True))
    k, v = torch.randn(B, HEADS, 30, 4), torch.randn(B, HEADS, 30, WIDTH)
    store.append(0, k[:, :, :25], v[:, :, :25])
    positions = torch.cat([some(9, 20), torch.arange(20, 25).expand(B, HEADS, 5)], -1)
    store.evict(0, Keep(positions, torch.zeros(B, HEADS, 14), 5))
    assert (store.length(0), store.seen(0), store.evicted[0]) == (14, 25, 11)
    store.pin(0, some(6, 12))
    moved: list[int] = []
    store.on_fetch = moved.append
    store.append(0, k[:, :, 25:], v[:, :, 25:])
    chosen = some(7, 15)
    read = store.read(0, store.fetch(0, chosen, None, 3), None, 3)
    at = store.locate(0, read.positions)
    assert torch.equal(at[..., -3:], torch.arange(27, 30).expand(B, HEADS, 3))
    assert torch.equal(read.k, pick(k, at))
    assert torch.equal(read.v, pick(v, at))
    slots = store.pinned[0].find(chosen)
    assert slots is not None
    assert sum(moved) == int((slots < 0).sum()) * 7 * 4
    with pytest.raises(CacheStateError):
        crop(store, 0, 11)
    assert store.seen(0) == 30, "a refused crop changes nothing"
    store.clear(0)
    assert store.near.used == store.host.used == store.evicted[0] == 0
