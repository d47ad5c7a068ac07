"""`farkv.ask`: one question in one call; the model is afterwards what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CapacityError, ConfigError, InputError
from farkv.hf.load import load_model
from farkv.hf.prompt import build_prompt
from farkv.methods import Full, Window
from tests.command import CODE, QUESTION


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("demo", device="cpu")


def test_it_answers_and_has_the_receipt(loaded: Any) -> None:
    model, tokenizer = loaded
    pieces: list[str] = []
    read: list[tuple[int, int]] = []
    answer = farkv.ask(
        model, tokenizer, CODE, QUESTION, max_new_tokens=4, verify=2, chunk_tokens=64, near="8MiB",
        on_text=pieces.append, on_read=lambda *told: read.append(told),
    )  # fmt: skip
    assert str(answer) == answer.text == answer.receipt.answer == "".join(pieces) == "4821"
    assert (answer.receipt.generated_tokens, answer.receipt.limits.near) == (4, 8 << 20)
    assert answer.receipt.quality is not None
    n_tokens = len(build_prompt(tokenizer, CODE, QUESTION).text)
    assert read[0] == (0, n_tokens)
    assert read[-1] == (n_tokens, n_tokens)
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert 0 < read[1][0] < 64, "within the first pass"
    assert repr(answer) == "Answer('4821')"
    assert "4821" in answer._repr_html_()
    assert "<table" in answer._repr_html_()
    # Not attached any more, and without hooks of ours.
    with farkv.attach(model):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_an_attached_model_answers_by_its_own_method_and_stays_so(loaded: Any) -> None:
    model, tokenizer = loaded
    with farkv.attach(model, Window(fraction=0.5)) as far:
        answer = farkv.ask(model, tokenizer, CODE, QUESTION, max_new_tokens=2)
        assert answer.receipt.method == "window"
        assert far.receipt().method == "window"
        with pytest.raises(ConfigError, match="attached already, by its own options; leave Full, near out"):
            farkv.ask(model, tokenizer, CODE, QUESTION, Full(), near="1GiB")
    assert farkv.ask(model, tokenizer, CODE, QUESTION, Full(), max_new_tokens=2).receipt.method == "full"


def test_it_samples_as_generate_does(loaded: Any) -> None:
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, CODE, "def ")
    ids = torch.tensor([prompt.text + prompt.question])
    options: Any = {"temperature": 1.5, "top_p": 0.9, "top_k": 7}
    torch.manual_seed(3)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, **options)
    torch.manual_seed(3)
    answer = farkv.ask(model, tokenizer, CODE, "def ", Full(), max_new_tokens=8, **options)
    assert str(answer) == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert str(farkv.ask(model, tokenizer, CODE, QUESTION, max_new_tokens=8, stop="82")) == "482"


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"top_p": 0.9}, ConfigError, "top_p: limits what is drawn, and temperature 0 takes the likeliest token; give"),
        ({"top_k": 5}, ConfigError, "top_k: limits what is drawn"),
        ({"top_p": 1.5, "temperature": 1.0}, ConfigError, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_k": 0, "temperature": 1.0}, ConfigError, "top_k: expected an integer of at least 1, got 0"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: expected an integer of at least 1"),
        ({"system": "be brief"}, InputError, "has no chat template"),
        ({"stop": ["\ud800"]}, InputError, "stop: expected text"),
        ({"near": "1KiB"}, CapacityError, "near limit"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model(loaded: Any, options: Any, kind: Any, says: str) -> None:
    model, tokenizer = loaded
    with pytest.raises(kind, match=says):
        farkv.ask(model, tokenizer, CODE, QUESTION, **options)
    assert not any(module._forward_hooks for module in model.modules())
