"""Growing rows against a plain tensor, for any sequence of operations, limits included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError
from farkv.store.far import rows as rows_module
from farkv.store.far.rows import Rows, gather_rows
from farkv.store.ledger import Ledger

HEADS, WIDTH = 2, 3
CPU = torch.device("cpu")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=14,
)


def apply(model: torch.Tensor, name: str, value: Any, new: torch.Tensor | None) -> torch.Tensor:
    """Do the same to a plain tensor."""
    match name:
        case "append":
            assert new is not None
            return new if model.shape[2] == 0 else torch.cat([model, new], 2)
        case "crop":
            return model[:, :, : max(0, model.shape[2] - value)]
        case "select":
            return model[[i % model.shape[0] for i in value]]
        case _:
            return torch.empty(2, HEADS, 0, WIDTH)


@given(OPERATIONS, st.sampled_from([0, 50, 200]), st.none() | st.integers(100, 60_000))
def test_rows_equal_a_plain_tensor(operations: list[tuple[str, Any]], reserve: int, limit: int | None) -> None:
    ledger = Ledger("host", limit)
    rows = Rows(ledger, device=CPU, reserve=reserve)
    model = torch.empty(2, HEADS, 0, WIDTH)
    generator = torch.Generator().manual_seed(0)
    for name, value in operations:
        empty = rows.data is None
        if name == "select" and empty:
            continue
        new = None
        if name == "append":
            batch = 2 if empty else rows.data.shape[0]  # type: ignore[union-attr]
            new = torch.randn(batch, HEADS, value, WIDTH, generator=generator)
        before = (rows.length, rows.n_bytes, ledger.used)
        try:
            match name:
                case "append":
                    rows.append(new[..., :1], new[..., 1:])  # type: ignore[index]
                case "crop":
                    rows.cut(rows.length - value)
                case "select":
                    rows.select(torch.tensor([i % model.shape[0] for i in value]))
                case _:
                    rows.clear()
        except CapacityError:
            assert (rows.length, rows.n_bytes, ledger.used) == before
            continue
        if name == "append" and empty:
            model = torch.empty(batch, HEADS, 0, WIDTH)
        model = apply(model, name, value, new)
        assert rows.length == model.shape[2]
        assert rows.data is None or torch.equal(rows.view(), model)
        assert ledger.used == rows.n_bytes
        assert limit is None or ledger.peak <= limit


def test_reserved_rows_never_move() -> None:
    rows = Rows(Ledger("host"), device=CPU, reserve=64)
    rows.append(torch.zeros(1, HEADS, 3, WIDTH))
    place = rows.view().data_ptr()
    for _ in range(61):
        rows.append(torch.zeros(1, HEADS, 1, WIDTH))
    assert rows.view().data_ptr() == place
    assert rows.length == 64


def test_a_tight_limit_is_used_to_the_last_byte() -> None:
    row = HEADS * WIDTH * 4
    rows = Rows(Ledger("host", 10 * row), device=CPU)
    rows.append(torch.zeros(1, HEADS, 10, WIDTH))
    assert rows.ledger.used == 10 * row


def test_joined_rows_stand_right_and_are_charged_once() -> None:
    mine, theirs = Ledger("host", None), Ledger("host", None)
    a, b = Rows(mine, device=CPU), Rows(theirs, device=CPU)
    few, many = torch.randn(2, HEADS, 3, WIDTH), torch.randn(1, HEADS, 70, WIDTH)
    a.append(few)
    b.append(many)
    a.join(b, 70, (2, 1))
    assert a.heads == (3, HEADS)
    assert torch.equal(a.view()[:2, :, -3:], few)
    assert not a.view()[:2, :, :-3].any()
    assert torch.equal(a.view()[2:], many)
    assert (mine.used, theirs.used) == (a.n_bytes, 0)
    assert b.data is None
    a.join(b, 70, (3, 1))
    assert not a.view()[3].any(), "who has none yet gets zeros"
    assert torch.equal(a.view()[2:3], many)


def test_rows_are_gathered_per_sequence_and_head() -> None:
    rows = torch.randn(2, HEADS, 9, 5)
    positions = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(2 * HEADS)]).view(2, HEADS, 4)
    expected = rows.gather(2, positions[..., None].expand(-1, -1, -1, 5))
    assert torch.equal(gather_rows(rows, positions), expected)


def test_a_copy_of_pinned_rows_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied tensor would lie in ordinary memory, which a GPU cannot read."""
    pins: list[bool] = []

    def allocate(shape: Any, dtype: torch.dtype, device: torch.device, *, pin: bool = False) -> torch.Tensor:
        pins.append(pin)
        return torch.empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(rows_module, "allocate", allocate)
    rows = Rows(Ledger("host", None), device=CPU, pin=True)
    rows.append(torch.randn(1, HEADS, 5, WIDTH))
    twin = copy.deepcopy(rows)
    rows.append(torch.randn(1, HEADS, 1, WIDTH))
    assert all(pins)
    assert torch.equal(twin.view(), rows.view()[:, :, :5])
    assert twin.length == 5 and twin.get().data_ptr() != rows.get().data_ptr()
    assert twin.ledger is not rows.ledger
