"""Promise 1: reading everything equals the unmodified model, bit for bit, in every way of generating."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.methods import H2O, Full, InfiniGen, LowBit, Method, Pages, PyramidKV, SnapKV
from tests.models import FAMILIES, assert_same, forward, generate, make_model, make_prompt, plain_cache

WHOLE: dict[str, Method] = {
    "full": Full(),
    "ours": InfiniGen(fraction=1.0),
    "paper": InfiniGen(fraction=1.0, paper=True),
    "pages": Pages(fraction=1.0, page=8),
    "lowbit": LowBit(fraction=1.0),
    "h2o": H2O(fraction=1.0),
    "snapkv": SnapKV(fraction=1.0),
    "pyramidkv": PyramidKV(fraction=1.0),
}
PROMPTS = {"single": make_prompt(1), "padded": make_prompt(3, pad=9)}
GREEDY: dict[str, Any] = {}
BEAM: dict[str, Any] = {"num_beams": 3}


def compare(model: Any, method: Method, prompt: Any, near: str | None = None, **options: Any) -> farkv.hf.handle.Handle:
    plain = generate(model, prompt, **options)
    with farkv.attach(model, method, near=near) as far:
        assert_same(generate(model, prompt, far.new_cache(), **options), plain)
    return far


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [GREEDY, BEAM], ids=["greedy", "beam"])
@pytest.mark.parametrize("method", WHOLE)
def test_llama_every_way(method: str, options: Any, prompt: str, chunk: int | None, near: str | None) -> None:
    chunked = {} if chunk is None else {"prefill_chunk_size": chunk}
    compare(make_model("llama"), WHOLE[method], PROMPTS[prompt], near, **options, **chunked)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
def test_every_family(family: str, near: str | None) -> None:
    model = make_model(family)
    # Longer than the sliding windows of these models.
    compare(model, InfiniGen(fraction=1.0), make_prompt(3, pad=9), near, **BEAM)
    compare(model, InfiniGen(fraction=1.0, source="attn"), make_prompt(1), near)
    compare(model, Full(), make_prompt(2, pad=5), near)


@pytest.mark.parametrize("options", [GREEDY, BEAM], ids=["greedy", "beam"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bfloat16(family: str, options: Any) -> None:
    model = make_model(family, dtype=torch.bfloat16).to(torch.bfloat16)
    for method in (InfiniGen(fraction=1.0), InfiniGen(fraction=1.0, paper=True)):
        compare(model, method, PROMPTS["padded"], **options)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_eager_base(family: str, near: str | None) -> None:
    far = compare(make_model(family, implementation="eager"), InfiniGen(fraction=1.0), PROMPTS["padded"], near)
    assert far.receipt().kernel.split("+")[-1] == "torch-eager"


@pytest.mark.parametrize("source", ["attn", "residual", "post_attn"])
def test_every_source(source: Any) -> None:
    compare(make_model("llama"), InfiniGen(fraction=1.0, source=source), PROMPTS["padded"])


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_sampling_with_a_seed(near: str | None) -> None:
    model, prompt = make_model("llama"), PROMPTS["padded"]
    torch.manual_seed(11)
    plain = generate(model, prompt, do_sample=True, top_k=20)
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        torch.manual_seed(11)
        assert_same(generate(model, prompt, far.new_cache(), do_sample=True, top_k=20), plain)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt_neox", "phi3"])
def test_prompt_lookup(family: str, near: str | None) -> None:
    model, prompt = make_model(family), make_prompt(1, tokens=8)
    prompt = {name: row.repeat(1, 3) for name, row in prompt.items()}  # repeats: guesses are made, some are wrong
    compare(model, InfiniGen(fraction=1.0), prompt, near, n=12, prompt_lookup_num_tokens=3)


def test_assistant_model() -> None:
    assistant = make_model("llama", num_hidden_layers=2)
    compare(make_model("llama"), InfiniGen(fraction=1.0), PROMPTS["single"], n=10, assistant_model=assistant)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "lfm2"])
def test_two_turns_on_one_cache(family: str, near: str | None) -> None:
    model = make_model(family)

    def talk(cache: Any) -> list[Any]:
        first = generate(model, make_prompt(2), cache)
        ids = torch.cat([first.sequences, make_prompt(2, tokens=5, seed=3)["input_ids"]], 1)
        return [first, generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)]

    plain = talk(plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        for ours, theirs in zip(talk(far.new_cache()), plain, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copies_of_a_cache_go_their_own_ways(family: str, near: str | None) -> None:
    model = make_model(family)
    prefix = make_prompt(1)["input_ids"]
    ends = [make_prompt(1, tokens=4, seed=s)["input_ids"] for s in (5, 6, 7)]

    def branch(cache: Any) -> list[torch.Tensor]:
        forward(model, prefix, cache)
        copies = [copy.deepcopy(cache), copy.deepcopy(cache), cache]
        # One token at a time, in turns: state shared by mistake would show.
        rows = [[forward(model, end[:, t : t + 1], c) for c, end in zip(copies, ends, strict=True)] for t in range(4)]
        return [logits for row in rows for logits in row]

    plain = branch(plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        ours = branch(far.new_cache())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_chunks_by_hand_and_single_tokens(near: str | None) -> None:
    model, ids = make_model("llama"), make_prompt(2, tokens=30)["input_ids"]
    pieces = [ids[:, :1], ids[:, 1:12], ids[:, 12:13], ids[:, 13:20], *ids[:, 20:].split(1, 1)]

    def run(cache: Any) -> list[torch.Tensor]:
        return [forward(model, piece, cache) for piece in pieces]

    plain = run(plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        ours = run(far.new_cache())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("batch", [1, 2])
def test_crop_and_batch_changes(batch: int, near: str | None) -> None:
    model, ids = make_model("llama"), make_prompt(batch)["input_ids"]
    more = make_prompt(2 * batch, tokens=3, seed=9)["input_ids"]

    def run(cache: Any) -> torch.Tensor:
        forward(model, ids, cache)
        forward(model, ids[:, :1], cache)
        cache.crop(-4)
        cache.batch_repeat_interleave(2)
        forward(model, more[:, :1], cache)
        cache.batch_select_indices(torch.tensor([2 * batch - 1, 0]))
        return forward(model, more[:2, 1:2], cache)

    plain = run(plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        assert torch.equal(run(far.new_cache()), plain)


def test_reset_makes_a_cache_new() -> None:
    model = make_model("llama")
    plain = generate(model, PROMPTS["padded"])
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache()
        generate(model, make_prompt(1, tokens=40), cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_same(generate(model, PROMPTS["padded"], cache), plain)
