"""Guessed tokens are read under the cap, one by one, and counted: the answer is the one without guesses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.hf.handle import Handle
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Method, Oracle, Pages, SnapKV, Window
from tests.models import assert_same, forward, generate, make_model, make_prompt

# Words that come again and again, so that guesses from the prompt are often right.
IDS = make_prompt(1, tokens=12)["input_ids"].repeat(1, 10)
PROMPT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
NEW = 16
SELECTORS: dict[str, Method] = {
    "ours": InfiniGen(fraction=0.1),
    "own query": InfiniGen(fraction=0.1, source="query"),
    "paper": InfiniGen(fraction=0.5, paper=True, source="query"),
    "top_p": InfiniGen(fraction=0.2, top_p=0.5),
    "lowbit": LowBit(fraction=0.1),
    "pages": Pages(fraction=0.2),
    "oracle": Oracle(fraction=0.1),
    "window": Window(fraction=0.1),
}


def run(method: Method, family: str = "llama", prompt: Any = PROMPT, near: str | None = None, **options: Any) -> Any:
    model = make_model(family)
    with farkv.attach(model, method, near=near) as far:
        out = generate(model, prompt, far.new_cache(), n=NEW, **options)
        return out, far.receipt()


@pytest.mark.parametrize("name", SELECTORS)
def test_guesses_change_no_token(name: str) -> None:
    plain, alone = run(SELECTORS[name])
    guessed, receipt = run(SELECTORS[name], prompt_lookup_num_tokens=3)
    assert torch.equal(guessed.sequences, plain.sequences)
    for a, b in zip(guessed.logits, plain.logits, strict=True):
        # Several rows at once: linear maps round otherwise.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert receipt.generated_tokens == alone.generated_tokens == NEW
    assert receipt.read_fraction == pytest.approx(alone.read_fraction, rel=0.05)
    assert receipt.exact == "no"


@pytest.mark.parametrize("name", ["own query", "lowbit", "oracle"])
def test_also_where_records_travel(name: str) -> None:
    plain = run(SELECTORS[name], near="1MiB")[0]
    guessed, receipt = run(SELECTORS[name], near="1MiB", prompt_lookup_num_tokens=3)
    assert torch.equal(guessed.sequences, plain.sequences)
    assert receipt.fetched_bytes_per_token > 0


def test_nothing_is_estimated_ahead_for_guesses_and_that_is_said() -> None:
    receipt = run(InfiniGen(fraction=0.1), near="1MiB", prompt_lookup_num_tokens=3)[1]
    assert receipt.fallbacks["own_query"] > 0
    assert receipt.read_fraction <= 0.1
    assert "own_query" not in run(InfiniGen(fraction=0.1), near="1MiB")[1].fallbacks


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen2"])
def test_in_other_models(family: str) -> None:
    plain, alone = run(InfiniGen(fraction=0.2), family)
    guessed, receipt = run(InfiniGen(fraction=0.2), family, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed.sequences, plain.sequences)
    assert receipt.managed_read_fraction <= 0.2 + 1e-9
    assert receipt.read_fraction == pytest.approx(alone.read_fraction, rel=0.05)


def test_with_a_smaller_model() -> None:
    assistant = make_model("llama", num_hidden_layers=2)
    plain = run(InfiniGen(fraction=0.1))[0]
    guessed, receipt = run(InfiniGen(fraction=0.1), assistant_model=assistant)
    assert torch.equal(guessed.sequences, plain.sequences)
    assert receipt.read_fraction <= 0.1 + 1e-9


def test_a_padded_prompt() -> None:
    ids = torch.cat([torch.zeros(1, 7, dtype=torch.long), IDS], 1)
    prompt = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    plain = run(InfiniGen(fraction=0.2), prompt=prompt)[0]
    guessed = run(InfiniGen(fraction=0.2), prompt=prompt, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(guessed.sequences, plain.sequences)


def test_a_second_turn_is_refused_because_it_would_be_read_twice() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        cache = far.new_cache()
        first = generate(model, PROMPT, cache, n=8, prompt_lookup_num_tokens=3).sequences
        ids = torch.cat([first, IDS[:, :20]], 1)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        held = cache.get_seq_length()
        with pytest.raises(CacheStateError, match="assisted decoding"):
            generate(model, prompt, cache, n=8, prompt_lookup_num_tokens=3)
        assert cache.get_seq_length() == held
        again = generate(model, prompt, cache, n=8)
        receipt = far.receipt()
        alone = far.new_cache()
        generate(model, PROMPT, alone, n=8)
        expected = generate(model, prompt, alone, n=8)
    assert torch.equal(again.sequences, expected.sequences)
    assert receipt.generated_tokens == 16
    assert receipt.read_fraction <= 0.1 + 1e-9, "a second prompt is no step"


def test_where_heads_read_by_turns_the_cap_holds() -> None:
    receipt = run(InfiniGen(fraction=0.1, burst=4.0), prompt_lookup_num_tokens=3)[1]
    assert 0 < receipt.read_fraction <= 0.1 + 1e-9


@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0)])
def test_whole_reads_are_counted(method: Method) -> None:
    model = make_model("llama")
    plain = generate(model, PROMPT, n=NEW, prompt_lookup_num_tokens=3)
    guessed, receipt = run(method, prompt_lookup_num_tokens=3)
    assert_same(guessed, plain)
    assert (receipt.read_fraction, receipt.generated_tokens, receipt.exact) == (1.0, NEW, "bit")
    assert receipt.time.tokens_per_s > 0


def read(far: Handle, cache: Any) -> tuple[float, int]:
    receipt = far.receipt(cache)
    return receipt.read_fraction, receipt.generated_tokens


def test_in_a_loop_of_ones_own_several_tokens_are_counted_unless_they_are_announced() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        cache = far.new_cache()
        forward(model, IDS[:, :100], cache)
        assert read(far, cache) == (0.0, 0)
        forward(model, IDS[:, 100:101], cache)
        one, announced = read(far, cache), copy.deepcopy(cache)
        assert one[1] == 1
        forward(model, IDS[:, 101:105], cache)
        fraction, n = read(far, cache)
        assert n == 5
        # Four tokens read all that is before them, one a tenth.
        held = sum(range(101, 106))
        assert fraction == pytest.approx((one[0] * 101 + held - 101) / held)
        announced.engine.announce_prompt(105, 2048)
        forward(model, IDS[:, 101:105], announced)
        assert read(far, announced) == one


@pytest.mark.parametrize("method", [XKV(fraction=0.5), SnapKV(fraction=0.5), H2O(fraction=0.5)])
def test_what_evicts_reads_all_it_kept_and_says_so(method: Method) -> None:
    receipt = run(method, prompt_lookup_num_tokens=3)[1]
    assert receipt.fallbacks["whole_guesses"] > 0
    assert receipt.generated_tokens == NEW
    assert 0.4 < receipt.read_fraction < 0.6
    assert "whole_guesses" not in run(method)[1].fallbacks


def test_a_pass_of_guesses_that_is_stopped_is_taken_back() -> None:
    model, n_passes = make_model("llama"), []

    def stop(*args: Any) -> None:
        n_passes.append(1)
        if len(n_passes) == 3:
            raise KeyboardInterrupt

    plain = run(InfiniGen(fraction=0.1))[0].sequences
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        cache = far.new_cache()
        hook = model.model.layers[2].mlp.register_forward_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                generate(model, PROMPT, cache, n=NEW, prompt_lookup_num_tokens=3)
        finally:
            hook.remove()
        n = cache.get_seq_length()
        assert cache.engine.list_tokens() != [n] * 4, "half a pass is stored"
        ids = plain[:, : n + 1]
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rest = generate(model, prompt, cache, n=plain.shape[1] - n - 1)
    assert torch.equal(rest.sequences, plain)
