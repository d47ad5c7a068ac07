"""What is prompted: byte for byte, the question token by token, chat templates not stripped."""

from __future__ import annotations

import pytest
import torch

import farkv
from farkv.errors import InputError
from farkv.hf.ask import Decoding, Listener, ask, cut_text
from farkv.hf.load import load_model
from farkv.hf.prompt import build_prompt
from farkv.methods import Full, InfiniGen


@pytest.fixture(scope="module")
def loaded():
    return load_model("demo", device="cpu")


@pytest.mark.parametrize(
    ("text", "question", "joined"),
    [
        ("a = 1\n", "print(a)  # ", "a = 1\nprint(a)  # "),
        ("a = 1", "print(a)  # ", "a = 1\nprint(a)  # "),
        ("  a\n\n", "  q  ", "  a\n\n  q  "),
        ("", "print(a)", "print(a)"),
        ("only text ", "", "only text "),
    ],
)
def test_text_and_question_byte_for_byte(loaded, text: str, question: str, joined: str) -> None:
    tokenizer = loaded[1]
    prompt = build_prompt(tokenizer, text, question)
    assert tokenizer.decode(prompt.text + prompt.question) == joined
    assert prompt.text + prompt.question == tokenizer(joined)["input_ids"]
    assert prompt.question, "something is left to decode from"
    if question and text:
        assert tokenizer.decode(prompt.question) == question


def test_a_chat_template_frames_the_unstripped_text(loaded) -> None:
    tokenizer = loaded[1]
    tokenizer.chat_template = "<u>{{ messages[0]['content'] | trim }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    try:
        prompt = build_prompt(tokenizer, "  text \n", " question ")
        assert tokenizer.decode(prompt.text + prompt.question) == "<u>  text \n question </u><a>"
        assert tokenizer.decode(prompt.question) == " question </u><a>"
    finally:
        tokenizer.chat_template = None


def test_an_empty_prompt_is_refused(loaded) -> None:
    with pytest.raises(InputError, match="empty"):
        build_prompt(loaded[1], " \n", "")


def test_the_answer_is_that_of_plain_generate(loaded) -> None:
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, "import os\n\n\ndef f(x):\n    return x\n" * 8, "class A")
    ids = torch.tensor([prompt.text + prompt.question])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(plain[0, ids.shape[1] :])
    for method in (Full(), InfiniGen(fraction=1.0)):
        pieces: list[str] = []
        with farkv.attach(model, method) as far:
            cache = far.new_cache(tokens=prompt.n_tokens + 12)
            decoding, listener = Decoding(12, chunk_tokens=32), Listener(on_text=pieces.append)
            answer = ask(far, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)
            receipt = far.receipt()
        assert answer == expected == "".join(pieces)
        assert receipt.generated_tokens == 12
        assert receipt.context_tokens == prompt.n_tokens
        assert cache.account.is_cut, "twelve tokens are no end"


def test_an_answer_that_ends_is_not_cut(loaded) -> None:
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, "import os\n" * 20, "class A")
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(1), listener=Listener())
        assert cache.account.is_cut
    config, before = model.generation_config, model.generation_config.eos_token_id
    with farkv.attach(model, Full()) as far:
        made = model.generate(
            torch.tensor([prompt.text + prompt.question]),
            past_key_values=far.new_cache(),
            max_new_tokens=1,
            do_sample=False,
        )[0, -1]
        config.eos_token_id = int(made)
        try:
            cache = far.new_cache()
            ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(1), listener=Listener())
            assert not cache.account.is_cut
        finally:
            config.eos_token_id = before


def test_verified_after_a_prefill_in_chunks(loaded) -> None:
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, "x = 1\n" * 60, "print(x)  # ")
    for chunk in (2048, 50):
        with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
            cache = far.new_cache(verify=4)
            ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(3, chunk_tokens=chunk))
            quality = far.receipt().quality
        assert quality is not None
        assert quality.steps == 4
        assert 0 < quality.mass_min <= quality.mass_mean <= 1


def test_the_question_is_decoded_not_prefilled(loaded) -> None:
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, "x = 1\n" * 60, "print(x)  # ")
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        cache = far.new_cache()
        ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(3))
    # The last new token is never fed back.
    assert cache.account.decode_steps == len(prompt.question) + 2


@pytest.mark.parametrize(
    ("n_tokens", "chunk", "sizes"),
    [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (2049, 2048, [2047, 2]), (1, 4, [1]), (3, 1, [1, 1, 1]), (0, 4, [])],
)
def test_no_token_of_a_text_is_read_alone_at_its_end(n_tokens: int, chunk: int, sizes: list[int]) -> None:
    """It would be a decode step, before what evicts has evicted; chunks of two have no choice."""
    assert cut_text(n_tokens, chunk) == sizes
