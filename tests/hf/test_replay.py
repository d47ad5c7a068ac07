"""What the sparse path computes equals dense attention with the unchosen keys hidden, for every method and family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.methods import InfiniGen, LowBit, Method, Oracle, Pages, Random, Window
from tests.hf.tape import Tape, check_replay
from tests.models import generate, make_model, make_prompt

METHODS: dict[str, Method] = {
    "post_attn": InfiniGen(fraction=0.3),
    "residual": InfiniGen(fraction=0.3, source="residual"),
    "attn": InfiniGen(fraction=0.3, source="attn"),
    "paper": InfiniGen(fraction=0.45, paper=True),
    "alpha": InfiniGen(fraction=0.4, alpha=2.0),
    "top_p": InfiniGen(fraction=0.4, top_p=0.6),
    "window": Window(fraction=0.3),
    "random": Random(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "pages": Pages(fraction=0.3, page=8),
    "lowbit": LowBit(fraction=0.3),
    "lowbit_4": LowBit(fraction=0.3, bits=4),
}
SINGLE = make_prompt(1, tokens=40)
PADDED = make_prompt(3, tokens=40, pad=16)


def run(model: Any, method: Method, prompt: Any, near: str | None = None, **options: Any) -> None:
    reference = copy.deepcopy(model)
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=5, **options)
    check_replay(reference, tape)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", METHODS)
def test_llama_padded(method: str, near: str | None) -> None:
    run(make_model("llama"), METHODS[method], PADDED, near)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", ["post_attn", "paper", "top_p", "pages", "lowbit"])
def test_llama_beams(method: str, near: str | None) -> None:
    run(make_model("llama"), METHODS[method], make_prompt(2, tokens=40, pad=16), near, num_beams=3)


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3", "gpt_oss", "opt", "gpt_neox", "phi3", "granite", "qwen3", "qwen3_next", "lfm2"]
)
def test_every_family(family: str) -> None:
    # Older releases run Gemma 2 on sdpa, which ignores its softcap; the replay's own attention does not.
    model = make_model(family, implementation="eager") if family == "gemma2" else make_model(family)
    run(model, METHODS["post_attn"], PADDED)
    run(model, METHODS["attn"], SINGLE, "1MiB")


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_almost_only_padding(method: str) -> None:
    # Fewer real tokens than the cap: padding fills the choice and must weigh nothing, no real one may weigh twice.
    run(make_model("llama"), METHODS[method], make_prompt(2, tokens=40, pad=37), "1MiB")


def test_eager_base() -> None:
    run(make_model("gemma2", implementation="eager"), METHODS["alpha"], PADDED)


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_after_a_crop_and_a_second_turn(near: str | None) -> None:
    model = make_model("llama")
    ids = make_prompt(2, tokens=60)["input_ids"]
    with farkv.attach(model, METHODS["post_attn"], near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            for piece in (ids[:, :40], *ids[:, 40:44].split(1, 1)):
                model(input_ids=piece, past_key_values=cache)
            kept = len(tape.passes)
            model(input_ids=ids[:, :1], past_key_values=cache)
            model(input_ids=ids[:, 1:2], past_key_values=cache)
            cache.crop(-2)
            del tape.passes[kept:]
            for piece in (ids[:, 44:50], *ids[:, 50:54].split(1, 1)):
                model(input_ids=piece, past_key_values=cache)
    check_replay(make_model("llama"), tape)


def test_the_newest_record_and_no_padding_is_read() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, PADDED, cache, n=4)
    for step, p in enumerate(tape.decode()):
        real = torch.nn.functional.pad(PADDED["attention_mask"], (0, step + 1), value=1).bool()
        for positions, valid in p.reads.values():
            assert (positions == real.shape[1] - 1).any(-1).all()
            seen = real[:, None].expand(*positions.shape[:2], -1).gather(-1, positions)
            assert (seen if valid is None else seen | ~valid).all()
