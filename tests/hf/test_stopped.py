"""Why an answer is no longer, how long it is, and when its first token came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import farkv
from farkv.hf.ask import Decoding, ask
from farkv.hf.load import load_model
from farkv.hf.prompt import build_prompt
from farkv.methods import Full, InfiniGen
from farkv.receipt import Receipt
from tests.models import forward, generate, make_model, make_prompt

PROMPT = make_prompt(1, tokens=20)


def run(prompt: Any = PROMPT, **options: Any) -> Receipt:
    model = make_model("llama")
    with farkv.attach(model, Full()) as far:
        generate(model, prompt, far.new_cache(), **options)
        return far.receipt()


def made(prompt: Any = PROMPT, n: int = 6) -> torch.Tensor:
    return generate(make_model("llama"), prompt, n=n).sequences[:, prompt["input_ids"].shape[1] :]


def test_an_answer_is_as_long_as_it_may_be() -> None:
    receipt = run(n=6)
    assert (receipt.stop_reason, receipt.generated_tokens) == ("length", 6)
    assert run(n=None, max_length=24).stop_reason == "length"
    model, config = make_model("llama"), GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    with farkv.attach(model, Full()) as far:
        model.generate(**PROMPT, past_key_values=far.new_cache(), generation_config=config)
        assert (far.receipt().stop_reason, far.receipt().generated_tokens) == ("length", 3)


def test_the_model_ends_its_answer() -> None:
    third = int(made()[0, 2])
    receipt = run(n=6, eos_token_id=third)
    assert receipt.stop_reason == "end"
    assert receipt.generated_tokens == made()[0].tolist().index(third) + 1


def test_of_a_batch_the_last_one_counts() -> None:
    prompt = make_prompt(2, tokens=20, pad=5)
    one, two = made(prompt, 8).tolist()
    only = next(token for token in one if token not in two)
    assert run(prompt, n=8, eos_token_id=only).stop_reason == "length", "the other one has no end"
    assert run(prompt, n=8, eos_token_id=[only, two[0]]).stop_reason == "end"


class Rule(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 22)


def test_a_rule_of_the_callers_own_has_no_name() -> None:
    receipt = run(n=6, stopping_criteria=StoppingCriteriaList([Rule()]))
    assert (receipt.stop_reason, receipt.generated_tokens) == (None, 2)


def test_the_time_is_over() -> None:
    receipt = run(n=50, max_time=1e-9)
    assert (receipt.stop_reason, receipt.generated_tokens) == ("time", 1)


def test_who_stops_it_is_told_what_there_is() -> None:
    model, n_passes = make_model("llama"), []

    def stop(*args: Any) -> None:
        n_passes.append(1)
        if len(n_passes) == 4:
            raise KeyboardInterrupt

    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        hook = model.lm_head.register_forward_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                generate(model, PROMPT, cache)
        finally:
            hook.remove()
        receipt = far.receipt()
    # Three passes were whole: the prompt's, and two that read the tokens it made; each made one.
    assert (receipt.stop_reason, receipt.generated_tokens, receipt.context_tokens) == ("interrupted", 3, 22)


def test_nobody_generated() -> None:
    model = make_model("llama")
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        forward(model, PROMPT["input_ids"], cache)
        assert far.receipt().time.first_token_s is None
        forward(model, PROMPT["input_ids"][:, :1], cache)
        receipt = far.receipt()
    assert (receipt.stop_reason, receipt.generated_tokens) == (None, 1)
    assert receipt.time.first_token_s is not None


def test_a_stop_string_is_found() -> None:
    model, tokenizer = load_model("demo", device="cpu")
    prompt = build_prompt(tokenizer, "import os\n" * 20, "class A")
    with farkv.attach(model, Full()) as far:
        answer = ask(far, tokenizer, prompt, cache=far.new_cache(), decoding=Decoding(12))
        assert far.receipt().stop_reason == "length"
        receipts = []
        for stop in (answer[1:4], answer[-1:], "\0never\0"):
            cache = far.new_cache()
            ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(12, stop=(stop,)))
            receipts.append(far.receipt(cache))
    assert [receipt.stop_reason for receipt in receipts] == ["stop_string", "stop_string", "length"]
    assert receipts[0].generated_tokens < 12


def test_the_first_token_comes_of_the_pass_that_reads_the_prompts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that moves by one whenever it is asked, twice per pass: a pass takes one, and one lies between two.
    ticks = iter(range(10**6))
    monkeypatch.setattr("farkv.hf.cache.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    model, tokenizer = load_model("demo", device="cpu")
    prompt = build_prompt(tokenizer, "x = 1\n" * 40, "print(x)  # ")
    n_question = len(prompt.question)
    with farkv.attach(model, InfiniGen(fraction=0.2)) as far:
        ask(far, tokenizer, prompt, cache=far.new_cache(), decoding=Decoding(4, chunk_tokens=50))
        time = far.receipt().time
    n_chunks = time.prefill_s
    per_pass = time.total_s / (n_chunks + n_question + 3)
    assert time.first_token_s == pytest.approx(per_pass * (n_chunks + n_question), abs=per_pass)
    assert time.prefill_s + time.decode_s <= time.total_s
