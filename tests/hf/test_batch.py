"""Batch independence: a sequence chooses and answers the same alone and beside longer ones, behind padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.methods import InfiniGen, LowBit, Oracle, Pages, Window
from farkv.store.sizes import count_cap
from tests.hf.tape import Tape, replay, worst
from tests.models import generate, make_model, make_prompt

# At 0.1 the caps of 101 to 104 tokens and of four more each are all 10, so both choose the same number.
ALONE, PAD, STEPS = 100, 4, 4
FRACTION = 0.1


def record(model: Any, method: Any, prompt: Any, profile: Any, near: Any) -> Tape:
    with farkv.attach(model, method, profile=profile, near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=STEPS + 1)
    return tape


def test_the_caps_of_this_file_are_equal() -> None:
    for step in range(1, STEPS + 1):
        assert count_cap(FRACTION, ALONE + step) == count_cap(FRACTION, ALONE + PAD + step)


def list_reads(read: Any, sequence: int, pads: int = 0) -> list[list[int]]:
    """Return the tokens that every KV head of a sequence reads, padding before them not counted."""
    positions, valid = read
    found: list[list[int]] = []
    for head, own in enumerate(positions[sequence]):
        kept = own if valid is None else own[valid[sequence, head]]
        found.append(sorted((kept - pads).tolist()))
    return found


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("skew", ["prompt", "profile"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_padded_sequence_equals_itself_alone(family: str, skew: str, near: Any) -> None:
    model = make_model(family)
    profile: Any = False
    if skew == "profile":
        profile = farkv.profile(model, [make_prompt(1, tokens=60, seed=8)["input_ids"][0]])
    ids = make_prompt(1, tokens=ALONE)["input_ids"]
    longer = make_prompt(1, tokens=ALONE + PAD, seed=5)["input_ids"]
    batch = {
        "input_ids": torch.cat([torch.nn.functional.pad(ids, (PAD, 0)), longer]),
        "attention_mask": torch.cat([torch.nn.functional.pad(torch.ones_like(ids), (PAD, 0)), torch.ones_like(longer)]),
    }
    # With fewer columns records tie nearly, and rounding decides.
    method = InfiniGen(fraction=FRACTION, columns=6)
    alone = record(model, method, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, profile, near)
    together = record(model, method, batch, profile, near)
    noise = worst(replay(model, alone.passes, torch.float32), replay(model, alone.passes, torch.float64))
    for a, b in zip(alone.decode(), together.decode(), strict=True):
        for layer in a.reads:
            assert list_reads(a.reads[layer], 0) == list_reads(b.reads[layer], 0, PAD), f"layer {layer}"
        assert (a.logits - b.logits[:1]).abs().max() <= 8 * noise


@pytest.mark.parametrize(
    "method",
    [
        InfiniGen(fraction=0.25),
        Oracle(fraction=0.25),
        Window(fraction=0.25),
        Pages(fraction=0.25),
        LowBit(fraction=0.25),
    ],
)
def test_sequences_of_one_length_do_not_see_each_other(method: Any) -> None:
    model = make_model("llama")
    both = make_prompt(2, tokens=ALONE)
    together = record(model, method, both, False, None)
    for i in (0, 1):
        alone = record(model, method, {k: v[i : i + 1] for k, v in both.items()}, False, None)
        for a, b in zip(alone.decode(), together.decode(), strict=True):
            for layer in a.reads:
                assert list_reads(a.reads[layer], 0) == list_reads(b.reads[layer], i), f"layer {layer}"


def test_deep_padding_changes_no_cap() -> None:
    # The cap counts a sequence's own tokens, not the columns of the batch.
    model = make_model("llama")
    ids = make_prompt(1, tokens=70)["input_ids"]
    pad = 40
    batch = {"input_ids": torch.cat([torch.nn.functional.pad(ids, (pad, 0)), make_prompt(1, tokens=110)["input_ids"]])}
    batch["attention_mask"] = (torch.arange(110) >= torch.tensor([[pad], [0]])).long()
    method = Oracle(fraction=0.25)
    alone = record(model, method, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, None)
    together = record(model, method, batch, False, None)
    mine, (positions, valid) = alone.decode()[0].reads[0][0][0], together.decode()[0].reads[0]
    assert valid is not None
    for a, b, flags in zip(mine, positions[0] - pad, valid[0], strict=True):
        assert a.tolist() == sorted(b[flags].tolist())
