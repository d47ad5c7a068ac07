"""The trace says which records were read, in buckets whose fractions are those of the account."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.methods import XKV, Full, InfiniGen, Window
from farkv.store.sizes import count_cap
from farkv.trace import ReadTrace, cut_evenly
from tests.models import forward, make_model, make_prompt

TOKENS, STEPS = 60, 4
IDS = make_prompt(2, tokens=TOKENS + STEPS)["input_ids"]


def record(method: Any, near: str | None = None, **sizes: int) -> tuple[Any, dict[str, Any]]:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        trace = cache.account.trace = ReadTrace(TOKENS, STEPS, **sizes)
        forward(model, IDS[:, :TOKENS], cache)
        for t in range(TOKENS, TOKENS + STEPS):
            forward(model, IDS[:, t : t + 1], cache)
    return cache, trace.to_dict()


def count_read(found: dict[str, Any]) -> float:
    """Return the records per head and sequence that a trace of one step and one token a bucket saw read."""
    return sum(share for layer in found["read"] for step in layer for share in step)


def test_edges_are_even_and_never_empty() -> None:
    assert cut_evenly(10, 4) == [0, 2, 5, 7, 10]
    assert cut_evenly(3, 16) == [0, 1, 2, 3]


def test_a_note_by_hand() -> None:
    # Six tokens and two steps in four buckets of two; two heads; the third step joins the second.
    trace = ReadTrace(6, 2, position_buckets=4)
    valid = torch.tensor([[[True, True, True], [True, True, False]]])
    trace.note(3, torch.tensor([[[0, 1, 4], [0, 5, 5]]]), valid, 6)
    trace.note(3, torch.tensor([[[0, 6], [1, 6]]]), None, 7)
    trace.note(3, torch.tensor([[[7, 9], [7, 9]]]), None, 10)
    found = trace.to_dict()
    assert found["layers"] == [3]
    assert found["step_edges"] == [0, 1, 2]
    assert found["position_edges"] == [0, 2, 4, 6, 8]
    # Of the last bucket there was one token, then four: what lies behind the last edge belongs to it.
    assert found["read"] == [[[3 / 4, 0.0, 2 / 4, 0.0], [2 / 8, 0.0, 0.0, 6 / 10]]]


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_full_reads_everything(near: str | None) -> None:
    _, found = record(Full(), near)
    assert found["layers"] == [0, 1, 2, 3]
    read = torch.tensor(found["read"], dtype=torch.float64)
    assert read.shape == (4, STEPS, 64)
    for step in range(STEPS):
        assert (read[:, step, : TOKENS + step + 1] == 1).all()
        assert (read[:, step, TOKENS + step + 1 :] == 0).all()


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_window_reads_sinks_and_window(near: str | None) -> None:
    _, found = record(Window(fraction=0.3), near)
    for layer in found["read"]:
        for step, shares in enumerate(layer):
            total = TOKENS + step + 1
            cap = count_cap(0.3, total)
            expected = [*range(4), *range(total - cap + 4, total)]
            assert [i for i, share in enumerate(shares) if share] == expected
            assert all(shares[i] == 1 for i in expected)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", [InfiniGen(fraction=0.3), InfiniGen(fraction=0.45, paper=True)])
def test_the_sum_is_the_books(method: Any, near: str | None) -> None:
    cache, found = record(method, near)
    held = sum(TOKENS + step + 1 for step in range(STEPS)) * len(found["layers"])
    assert count_read(found) / held == pytest.approx(cache.account.read_fraction(), abs=1e-12)


def test_of_an_evicted_cache_it_is_the_tokens_that_stayed() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        cache = far.new_cache()
        trace = cache.account.trace = ReadTrace(TOKENS, STEPS)
        forward(model, IDS[:, :TOKENS], cache)
        store, expected = cache.engine.store, torch.zeros(4, TOKENS + STEPS)
        for i in range(4):
            assert store.evicted[i]
            rows = torch.arange(store.length(i)).expand(*store.heads(i), -1)
            expected[i] = torch.bincount(store.locate(i, rows).flatten(), minlength=TOKENS + STEPS) / 4
        # And the step's own token.
        expected[:, TOKENS] = 1
        forward(model, IDS[:, TOKENS : TOKENS + 1], cache)
    read = trace.to_dict()["read"]
    assert [layer[0] for layer in read] == expected.tolist()


def test_buckets_hold_means() -> None:
    method = InfiniGen(fraction=0.3)
    _, fine = record(method)
    _, coarse = record(method, step_buckets=1, position_buckets=1)
    held = sum(TOKENS + step + 1 for step in range(STEPS))
    for layer, (row,) in zip(fine["read"], coarse["read"], strict=True):
        assert row == pytest.approx([sum(map(sum, layer)) / held])


def test_a_trace_changes_nothing() -> None:
    model = make_model("llama")
    logits = []
    for trace in (None, ReadTrace(TOKENS, 1)):
        with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
            cache = far.new_cache()
            cache.account.trace = trace
            forward(model, IDS[:, :TOKENS], cache)
            logits.append(forward(model, IDS[:, TOKENS : TOKENS + 1], cache))
    assert torch.equal(*logits)
