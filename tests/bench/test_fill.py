"""Random records: the same for every method, different from token to token; and what memory cannot hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from farkv.bench import fill
from farkv.bench.fill import KVSource, Noise, find_available_bytes, require_memory
from farkv.errors import CapacityError
from tests.bench.plain import TINY

CPU = torch.device("cpu")


def test_records_do_not_depend_on_how_they_are_drawn() -> None:
    source = KVSource(TINY, 2, CPU, rows=1 << 10)
    k, v = source.draw_kv(1, 0, 100)
    later_k, later_v = source.draw_kv(1, 40, 60)
    assert k.shape == (2, 2, 100, 16)
    assert torch.equal(k[:, :, 40:], later_k)
    assert torch.equal(v[:, :, 40:], later_v)
    assert torch.equal(source.draw_kv(1, 0, 100, torch.float32)[0], k.float())


def test_no_record_of_a_head_comes_twice_while_the_block_has_others() -> None:
    rows = Noise(4, CPU, rows=256).draw((1, 2, 256), 0, 0, torch.float32)
    assert len(rows[0, 0].unique(dim=0)) == 256
    assert not torch.equal(rows[0, 0], rows[0, 1])


def test_layers_keys_and_values_differ() -> None:
    source = KVSource(TINY, 1, CPU, rows=1 << 10)
    drawn = [*source.draw_kv(0, 0, 8), *source.draw_kv(1, 0, 8)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_chunks_cover_every_token_once() -> None:
    chunks = list(KVSource(TINY, 1, CPU, rows=1 << 8).chunks(10_000))
    assert chunks[0] == (0, 4096)
    assert sum(n for _, n in chunks) == 10_000
    assert all(a + n == b for (a, n), (b, _) in pairwise(chunks))


def test_what_memory_cannot_hold_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "find_available_bytes", lambda: 1 << 30)
    require_memory(1 << 28, "a context")
    with pytest.raises(CapacityError, match=r"a context needs 2.0 GiB, but only 512.0 MiB"):
        require_memory(2 << 30, "a context")


def test_this_machine_has_some_memory() -> None:
    assert find_available_bytes() > 1 << 20
