"""Pinned copies are found where they are, whatever happens to the pool."""

from __future__ import annotations

import torch

from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger
from farkv.store.near.pinned import Pinned
from tests.store.far.test_kept import CPU, HEADS, WIDTH, B, pick, some


def test_held_copies_are_found_where_they_are_through_every_operation() -> None:
    near, home = Ledger("near"), Ledger("host")
    held = Pinned(near, CPU, home, CPU)
    pool = torch.randn(B, HEADS, 30, WIDTH)
    assert held.find(some(3, 30)) is None
    chosen = some(10, 20)
    held.pin(pick(pool, chosen), chosen, (20, 30))
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
    held.crop(Cropped(22, 22))
    check(pool[:, :, :22], 10)
    keep = torch.cat([chosen[..., :6], torch.full((B, HEADS, 1), 21)], -1).sort(-1).values
    held.keep(keep)
    rows = pick(pool, keep)
    check(rows, 6)
    held.select(torch.tensor([1, 0, 1]))
    check(rows[[1, 0, 1]], 6)
    held.pin(pick(pool, every[..., 3:7]), every[..., 3:7], (20, 30))
    check(pool[:, :, :20], 4)
    held.clear()
    assert near.used == home.used == 0
