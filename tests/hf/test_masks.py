"""Masks of every kind that the plain model takes: at full budget equal to it, below it to the dense replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import farkv
from farkv.errors import CacheStateError
from farkv.methods import Full, InfiniGen, Oracle, Pages, Window
from tests.hf.tape import Tape, replay, worst
from tests.models import make_model, make_prompt, plain_cache

TOKENS = 40
# A prompt in two parts, steps, several tokens at once, a step.
SIZES = (24, 8, 1, 1, 5, 1)
HEADS = 4


def make_mask(kind: str, n_before: int, n_new: int) -> Tensor:
    """Return the mask of a pass, over the whole context."""
    n = n_before + n_new
    seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    generator = torch.Generator().manual_seed(5)
    if kind in ("holes", "numbers that hide"):
        # Two parts of the middle that nobody sees, but each token itself.
        seen[..., 5:9] = seen[..., 15:16] = False
    elif kind == "holes that differ from token to token":
        seen &= (torch.rand(n, n, generator=generator) < 0.8)[None, None]
    elif kind == "holes that differ from head to head":
        seen = seen & (torch.rand(HEADS, TOKENS, TOKENS, generator=generator) < 0.8)[None, :, :n, :n]
    seen = seen | torch.eye(n, dtype=torch.bool)
    rows = seen[:, :, n_before:]
    if kind == "numbers that hide":
        return torch.where(rows, 0.0, torch.finfo(torch.float32).min)
    if kind == "numbers that weigh":
        distance = (torch.arange(n)[None] - torch.arange(n_before, n)[:, None]).float()
        return torch.where(rows, 0.1 * distance, -torch.inf)
    return rows


KINDS = (
    "causal",
    "holes",
    "holes that differ from token to token",
    "holes that differ from head to head",
    "numbers that hide",
    "numbers that weigh",
)


def run(model: Any, cache: Any, kind: str) -> Tensor:
    """Return the logits of all tokens, in passes of several sizes."""
    ids, logits, at = make_prompt(tokens=TOKENS)["input_ids"], [], 0
    for size in SIZES:
        positions = torch.arange(at, at + size)[None]
        out = model(
            input_ids=ids[:, at : at + size], attention_mask=make_mask(kind, at, size), position_ids=positions,
            past_key_values=cache,
        )  # fmt: skip
        logits.append(out.logits)
        at += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["in place", "near", "disk"])
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0)], ids=["full", "infinigen"])
def test_at_full_budget_every_mask_is_the_plain_models(kind: str, tier: str, method: Any, tmp_path: Any) -> None:
    model = make_model("llama")
    plain = run(model, plain_cache(model), kind)
    limits: dict[str, dict[str, Any]] = {
        "near": {"near": "4MiB"},
        "disk": {"host": "4MiB", "disk": f"{tmp_path}:64MiB"},
    }
    with farkv.attach(model, method, **limits.get(tier, {})) as far:
        cache = far.new_cache()
        assert torch.equal(run(model, cache, kind), plain)
        assert far.receipt(cache).exact == "bit"


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("kind", ["holes", "holes that differ from token to token", "numbers that hide"])
@pytest.mark.parametrize(
    "method",
    [InfiniGen(fraction=0.3), Oracle(fraction=0.3), Pages(fraction=0.3, page=4), Window(fraction=0.3)],
    ids=lambda method: type(method).__name__,
)
def test_below_it_every_mask_of_tokens_is_the_dense_replays(kind: str, method: Any, near: str | None) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            run(model, cache, kind)
    for one in tape.passes:
        # The replay takes flags.
        mask = one.inputs["attention_mask"]
        one.inputs["attention_mask"] = mask if mask.dtype == torch.bool else mask == 0
    exact, single = (replay(model, tape.passes, dtype) for dtype in (torch.float64, torch.float32))
    assert worst([p.logits for p in tape.passes], exact) <= 8 * worst(single, exact)
    assert len(tape.decode()) >= 3
    for one in tape.decode():
        n = one.inputs["attention_mask"].shape[-1]
        seen = make_mask("holes" if kind == "numbers that hide" else kind, n - 1, 1)
        for positions, valid in one.reads.values():
            read = positions if valid is None else positions.masked_fill(~valid, n - 1)
            assert bool(seen[0, 0, 0][read].all()), "what a mask hides takes no part of the budget"


@pytest.mark.parametrize("kind", ["holes that differ from head to head", "numbers that weigh"])
def test_below_it_what_no_choice_can_follow_is_refused(kind: str) -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far, pytest.raises(CacheStateError, match="attention mask"):
        run(model, far.new_cache(), kind)
