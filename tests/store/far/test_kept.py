"""Eviction in the store: rows, places, scores and held copies stay together, and counts are shared out fairly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CacheStateError
from farkv.math.keep import choose_kept, join_scores
from farkv.store.far import rows as rows_module
from farkv.store.far.kept import ROW_BYTES, Kept
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger
from farkv.store.near.buffers import Pinned
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.sizes import Allowed, share_out
from farkv.store.tiers import Store

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


def test_places_and_marks_follow_every_operation() -> None:
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
    kept.crop(4, evicted=12)
    assert torch.equal(kept.places.view()[..., 0].long(), positions[..., :6])
    with pytest.raises(CacheStateError, match="at most 1 tokens to take back, got 2"):
        kept.crop(2, evicted=12)
    kept.select(torch.tensor([1, 1, 0]))
    assert torch.equal(kept.places.view()[..., 0].long(), positions[[1, 1, 0], :, :6])
    assert ledger.used == kept.places.n_bytes + kept.scores.n_bytes
    assert ledger.used // (kept.places.data.shape[2] * 3 * HEADS) in (ROW_BYTES, ROW_BYTES - 1)  # type: ignore[union-attr]
    kept.clear()
    assert ledger.used == 0


def test_nothing_that_was_evicted_can_be_taken_back_but_all_else_can() -> None:
    kept = Kept(Ledger("host"), CPU)
    kept.append(torch.zeros(B, HEADS, 20, 1), 0)
    kept.crop(20, evicted=0)
    assert kept.places.length == 0


def test_held_copies_are_found_where_they_are_through_every_operation() -> None:
    near, home = Ledger("near"), Ledger("host")
    held = Pinned(near, CPU, home, CPU)
    pool = torch.randn(B, HEADS, 30, WIDTH)
    assert held.find(some(3, 30)) is None
    chosen = some(10, 20)
    held.hold(pick(pool, chosen), chosen, (20, 30))
    every = torch.arange(20).expand(B, HEADS, -1)

    def check(rows: torch.Tensor, n_held: int) -> None:
        slots = held.find(torch.arange(rows.shape[2]).expand(*rows.shape[:2], -1))
        assert slots is not None
        here = slots >= 0
        assert (here.sum(-1) == n_held).all()
        copies = held.rows.view().gather(2, slots.clamp_min(0)[..., None].expand(-1, -1, -1, WIDTH))
        assert torch.equal(copies[here], rows[here])

    check(pool[:, :, :20], 10)
    assert near.used == held.rows.n_bytes == 10 * B * HEADS * WIDTH * 4
    held.append(4)
    held.crop(2)
    check(pool[:, :, :22], 10)
    keep = torch.cat([chosen[..., :6], torch.full((B, HEADS, 1), 21)], -1).sort(-1).values
    held.keep(keep)
    rows = pick(pool, keep)
    check(rows, 6)
    held.select(torch.tensor([1, 0, 1]))
    check(rows[[1, 0, 1]], 6)
    held.hold(pick(pool, every[..., 3:7]), every[..., 3:7], (20, 30))
    check(pool[:, :, :20], 4)
    held.clear()
    assert near.used == home.used == 0


def test_an_evicted_layer_reads_and_locates_what_is_left() -> None:
    store = Store([0], StoreLimits(near=1 << 20), CPU, Needs(2, evicts=True, holds=True))
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
        store.crop(0, 11)
    assert store.seen(0) == 30, "a refused crop changes nothing"
    store.clear(0)
    assert store.near.used == store.host.used == store.evicted[0] == 0


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


@given(
    n_rows=st.integers(1, 60), n_keep=st.integers(0, 70), n_recent=st.integers(0, 70), seed=st.integers(0, 99),
    spare=st.integers(0, 3),
)  # fmt: skip
def test_kept_records_are_those_of_a_plain_loop(n_rows: int, n_keep: int, n_recent: int, seed: int, spare: int) -> None:
    torch.manual_seed(seed)
    recent = min(n_recent, n_rows)
    old = n_rows - recent
    scores = torch.rand(B, HEADS, old + min(spare, recent))
    scores[..., :1] = torch.inf
    positions, scores = choose_kept(scores, n_rows, n_keep, n_recent)
    n_old = min(max(n_keep - recent, 0), old)
    assert positions.shape == scores.shape == (B, HEADS, n_old + recent)
    for b in range(B):
        for h in range(HEADS):
            row = scores[b, h, :old].tolist()
            best = sorted(sorted(range(old), key=lambda i: -row[i])[:n_old])
            assert positions[b, h].tolist() == best + list(range(old, n_rows))
            expected = [0.0 if row[i] == float("inf") else row[i] for i in best] + [0.0] * recent
            assert scores[b, h].tolist() == pytest.approx(expected)


def test_marks_remember_the_best_score() -> None:
    new, old = torch.rand(B, HEADS, 5), torch.rand(B, HEADS, 9).bfloat16()
    joined = join_scores(new, old)
    assert torch.equal(joined, torch.maximum(new, old[..., :5].float()))
    assert joined.dtype == torch.float32
    assert join_scores(scores, None) is scores
