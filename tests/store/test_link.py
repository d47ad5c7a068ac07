"""The link: few bytes are copied at once, many on its thread, with the same outcome and in the same order."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from farkv.store import link as link_module
from farkv.store.far.rows import Rows
from farkv.store.ledger import Ledger
from farkv.store.link import Link

CPU = torch.device("cpu")


def make_rows(n: int = 50) -> Rows:
    rows = Rows(Ledger("host"), device=CPU)
    rows.append(torch.randn(2, 3, n, 8))
    return rows


def fetch(link: Link, rows: Rows, count: Any = lambda n_bytes: None) -> tuple[Any, torch.Tensor, torch.Tensor]:
    positions = torch.randint(rows.length, (2, 3, 7)).sort(-1).values
    out = torch.empty(2, 3, 7, 8)
    return link.fetch(rows, positions, None, out, count), out, positions


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
def test_both_ways_bring_the_same_rows_and_count_them(inline_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "INLINE_BYTES", inline_bytes)
    rows, link, counted, threads = make_rows(), Link(CPU), [], set[int]()

    def count(n_bytes: int) -> None:
        counted.append(n_bytes)
        threads.add(threading.get_ident())

    ticket, out, positions = fetch(link, rows, count)
    ticket.wait()
    assert torch.equal(out, rows.view().gather(2, positions[..., None].expand(-1, -1, -1, 8)))
    assert counted == [out.numel() * 4]
    assert (threads == {threading.get_ident()}) == (inline_bytes > 0)


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
def test_what_fails_is_raised_where_it_is_waited_for(inline_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "INLINE_BYTES", inline_bytes)

    def fail(n_bytes: int) -> None:
        raise OSError("gone")

    ticket, _, _ = fetch(Link(CPU), make_rows(), fail)
    with pytest.raises(OSError, match="gone"):
        ticket.wait()


def test_few_bytes_wait_for_what_was_submitted_before() -> None:
    rows, link, order, gate = make_rows(), Link(CPU), [], threading.Event()

    def work() -> None:
        gate.wait()
        order.append("first")

    link.submit(work)
    ticket, _, _ = fetch(link, rows, lambda n_bytes: order.append("second"))
    assert order == []
    gate.set()
    ticket.wait()
    assert order == ["first", "second"]
