"""Drawn reads in a whole model: the same by kernels and plain operations, in place and near, alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import farkv
from farkv.methods import InfiniGen, gains
from tests.hf.tape import Tape, check_replay
from tests.models import forward, make_model, make_prompt

PROMPT, STEPS = 200, 6
OURS = InfiniGen(fraction=0.15, source="query")


@pytest.fixture
def all_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every head be drawn: on models of random weights few gain by it."""
    monkeypatch.setattr(gains, "LEAST_HEADS", 1)
    monkeypatch.setattr(gains, "find_gains", lambda seen, *_: torch.ones(seen.keys.shape[:2], dtype=torch.bool))


def read(ids: Tensor, mask: Tensor | None = None, chunk: int = PROMPT, **options: Any) -> tuple[list[Any], Tensor]:
    """Return what every step and layer read, with its odds, and the logits."""
    model = make_model("llama")
    with farkv.attach(model, OURS, **options) as far, torch.no_grad():
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            for start in range(0, PROMPT, chunk):
                feed(model, ids[:, start : start + chunk], cache, mask)
            for t in range(PROMPT, PROMPT + STEPS):
                feed(model, ids[:, t : t + 1], cache, mask)
    if mask is None:
        check_replay(model, tape)
    found = [(layer, *reads, p.odds.get(layer)) for p in tape.decode() for layer, reads in p.reads.items()]
    return found, torch.stack([p.logits for p in tape.decode()])


def feed(model: Any, ids: Tensor, cache: Any, mask: Tensor | None) -> None:
    if mask is None:
        forward(model, ids, cache)
        return
    seen = cache.get_seq_length() + ids.shape[1]
    model(input_ids=ids, attention_mask=mask[:, :seen], past_key_values=cache)


def make_ids(batch: int = 1) -> Tensor:
    return make_prompt(batch, tokens=PROMPT + STEPS)["input_ids"]


def as_sets(found: list[Any]) -> list[list[dict[int, float]]]:
    """Return per layer and step each head's positions with their odds."""
    out = []
    for _, positions, valid, odds in found:
        more = torch.zeros(positions.shape)
        if odds is not None:
            more[..., : odds.shape[-1]] = odds
        keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        rows = zip(positions.flatten(0, 1), more.flatten(0, 1), keep.flatten(0, 1), strict=True)
        out.append([dict(zip(at[k].tolist(), o[k].tolist(), strict=True)) for at, o, k in rows])
    return out


def check_alike(a: list[Any], b: list[Any]) -> None:
    for ours, theirs in zip(as_sets(a), as_sets(b), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.keys() == y.keys()
            assert max(abs(x[at] - y[at]) for at in x) < 0.05


@pytest.mark.usefixtures("all_draw")
def test_kernels_near_memory_and_plain_operations_draw_alike() -> None:
    ids = make_ids()
    plain, logits = read(ids, kernel="plain")
    assert any(odds is not None and bool((odds > 0).any()) for *_, odds in plain)
    for options in ({}, {"near": "1MiB"}, {"near": "1MiB", "kernel": "plain"}):
        found, others = read(ids, **options)
        check_alike(found, plain)
        assert (others - logits).abs().max() < 0.02 * logits.abs().max()


@pytest.mark.usefixtures("all_draw")
@pytest.mark.parametrize("kernel", ["plain", None])
def test_a_sequence_of_a_padded_batch_is_drawn_as_alone(kernel: Any) -> None:
    options = {} if kernel is None else {"kernel": kernel}
    ids, pad = make_ids(2), 40
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[1, :pad] = 0
    both, _ = read(ids, mask, **options)
    alone_mask = torch.ones(1, PROMPT + STEPS, dtype=torch.long)
    first, _ = read(ids[:1], alone_mask, **options)
    ours = [(layer, p[:1], None if v is None else v[:1], None if o is None else o[:1]) for layer, p, v, o in both]
    check_alike(ours, first)


@pytest.mark.parametrize("chunk", [8, 50])
def test_chunks_change_nothing(chunk: int) -> None:
    # Which heads draw is found by the same records and queries, however the prompt came.
    ids = make_ids()
    whole, _ = read(ids)
    found, _ = read(ids, chunk=chunk)
    check_alike(found, whole)


@pytest.mark.usefixtures("all_draw")
def test_a_token_that_is_taken_back_is_drawn_for_again_alike() -> None:
    model, ids = make_model("llama"), make_ids()
    with farkv.attach(model, OURS) as far, torch.no_grad():
        cache = far.new_cache()
        forward(model, ids[:, :PROMPT], cache)
        once = forward(model, ids[:, PROMPT : PROMPT + 1], cache)
        forward(model, ids[:, PROMPT + 1 : PROMPT + 2], cache)
        cache.crop(-2)
        again = forward(model, ids[:, PROMPT : PROMPT + 1], cache)
        assert torch.equal(once, again)
        receipt = far.receipt()
    assert receipt.read_fraction <= 0.15


def test_heads_are_tried_once_per_prompt_and_not_where_none_may_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(gains, "LEAST_HEADS", 1)
    monkeypatch.setattr(gains, "find_gains", lambda seen, *_: calls.append(1) or torch.zeros(seen.keys.shape[:2]))
    read(make_ids())
    # Two heads of four layers.
    assert len(calls) == 8
    calls.clear()
    model = make_model("llama")
    for method in (InfiniGen(fraction=0.15, sampled=False), InfiniGen(fraction=1.0), InfiniGen(fraction=0.15, burst=2)):
        with farkv.attach(model, method) as far, torch.no_grad():
            forward(model, make_ids()[:, :PROMPT], far.new_cache())
    with farkv.attach(model, InfiniGen(fraction=0.15), near="1MiB") as far, torch.no_grad():
        forward(model, make_ids()[:, :PROMPT], far.new_cache())
    # Its eight heads are too few for errors to average out.
    monkeypatch.setattr(gains, "LEAST_HEADS", 9)
    read(make_ids())
    assert not calls
