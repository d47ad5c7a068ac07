"""How questions are put: forms, chat templates, and the tokens that other programs feed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from farkv.errors import ConfigError, InputError
from farkv.evals.describe import Variant
from farkv.evals.judge import Judge
from farkv.evals.prompter import Prompter, choose_form
from farkv.evals.sample import Sample, Turn
from farkv.evals.text import Maker
from farkv.hf.load import load_model


@cache
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


def make_chatty() -> Any:
    """The demo's tokenizer with a chat template."""
    tokenizer = demo()[1]
    tokenizer = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def test_the_form_follows_from_model_and_tokenizer() -> None:
    tokenizer = demo()[1]
    chatty = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{{ messages }}"
    assert choose_form("auto", "demo", tokenizer, 1) == "code"
    assert choose_form("auto", "else", tokenizer, 1) == "completion"
    assert choose_form("auto", "else", chatty, 10**9) == "prefix"
    assert choose_form("auto", "else", chatty, 10**10) == "chat"
    assert choose_form("code", "else", chatty, 1) == "code"
    with pytest.raises(InputError, match="no chat template"):
        choose_form("prefix", "else", tokenizer, 1)
    with pytest.raises(ConfigError, match="expected auto, code"):
        choose_form("song", "else", tokenizer, 1)


def test_chat_models_are_asked_in_their_template() -> None:
    tokenizer = make_chatty()
    prompter = Prompter(tokenizer, "chat")
    turns = (Turn("q(1)  # ", "Say one.", "1", ("1",)), Turn("q(2)  # ", "Say two.", "2", ("2",)))
    prompt = prompter.build(Sample("t", 64, 0, "some text\n", turns))
    assert tokenizer.decode(prompt.text + prompt.question) == "<user>some text\nSay one.</user><assistant>"
    assert tokenizer.decode(prompter.follow(turns[1])) == "</assistant><user>Say two.</user><assistant>"
    begun = Prompter(tokenizer, "prefix")
    turn = turns[0]._replace(prefix="It is", answer=" 1")
    prompt = begun.build(Sample("t", 64, 0, "some text\n", (turn,)))
    assert tokenizer.decode(prompt.text + prompt.question) == "<user>some text\nSay one.</user><assistant>It is"
    assert tokenizer.decode(begun.encode_answer(turn)) == " 1"
    assert tokenizer.decode(prompter.encode_answer(turn)) == "1"


def lay_out(tokens: dict[str, Any]) -> tuple[list[int], list[range]]:
    """Return all that is fed, and where the tokens of answers stand, or of a continuation but its first."""
    ids, places = list(tokens["text"]), list[range]()
    for turn in tokens["turns"]:
        start = len(ids) + len(turn["question"])
        ids += turn["question"] + turn["answer"]
        places.append(range(start, len(ids)))
    if tokens["continuation"]:
        places.append(range(len(ids) + 1, len(ids) + len(tokens["continuation"])))
    return ids + tokens["continuation"], places


@pytest.mark.parametrize(("form", "task"), [("code", "multiturn"), ("code", "ppl"), ("completion", "orders"),
                                            ("chat", "orders"), ("prefix", "orders")])  # fmt: skip
def test_tokens_for_other_programs_are_those_that_are_fed(form: str, task: str) -> None:
    """Plain transformers, fed them in one dense pass, predicts what the full cache predicts."""
    model, tokenizer = demo()
    if form in ("chat", "prefix"):
        tokenizer = make_chatty()
    plain = Judge(model, tokenizer, form)
    sample = Maker(tokenizer, in_code=form == "code").make(task, 512, 0)
    output, _, _ = plain.answer(Variant("full", 1.0), plain.read([sample]))
    ids, places = lay_out(plain.prompter.list_tokens(sample))
    with torch.no_grad():
        dense = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [output.logs[0]] if output.logs is not None else [answer.logs for answer in output.answers[0]]
    for logs, at in zip(found, places, strict=True):
        torch.testing.assert_close(logs, dense[at.start - 1 : at.stop - 1], atol=2e-4, rtol=1e-4)
