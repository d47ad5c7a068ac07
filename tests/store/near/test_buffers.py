"""The recent window has the newest rows, whatever comes and goes."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger
from farkv.store.near.buffers import RecentWindow

CPU = torch.device("cpu")


@example(1, [(True, 1), (True, 2), (False, 1)])
@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(1, 14)), max_size=12))
def test_the_window_holds_the_newest(n: int, moves: list[tuple[bool, int]]) -> None:
    window = RecentWindow(Ledger("near"), CPU, n)
    model, seen = torch.empty(1, 1, 0, 2), 0
    for count, (push, size) in enumerate(moves):
        if push:
            new = torch.full((1, 1, size, 2), float(count)) + torch.arange(size).view(1, 1, -1, 1) / 100
            seen += size
            window.push(new[..., :1], new[..., 1:], seen=seen)
            model = torch.cat([model, new], 2)
        else:
            seen = max(0, seen - size)
            window.crop(Cropped(seen, seen))
            model = model[:, :, : max(0, model.shape[2] - size)]
        newest = window.newest(n, seen)
        if newest is not None:
            assert torch.equal(newest, model[:, :, -n:])
        elif push and size >= n:
            raise AssertionError("after a push of n rows they are all there")
