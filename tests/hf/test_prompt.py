"""A system message in the frame of a chat template, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from farkv.errors import InputError
from farkv.hf.load import load_model
from farkv.hf.prompt import build_prompt

BODY = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
BODY += "{% if add_generation_prompt %}<a>{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + BODY
DROPS = "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}</>{% endfor %}"
TWICE = "{{ messages[-1].content }}{{ messages[-1].content }}"


@pytest.fixture
def tokenizer() -> Iterator[Any]:
    found = load_model("demo", device="cpu")[1]
    yield found
    found.chat_template = None


def test_a_system_message_stands_unstripped_before_the_text(tokenizer: Any) -> None:
    tokenizer.chat_template = BODY
    prompt = build_prompt(tokenizer, " text\n", " question ", " be <brief> ")
    assert tokenizer.decode(prompt.text + prompt.question) == "<system> be <brief> </><user> text\n question </><a>"
    assert tokenizer.decode(prompt.question) == " question </><a>"
    without = build_prompt(tokenizer, " text\n", " question ")
    assert tokenizer.decode(without.text + without.question) == "<user> text\n question </><a>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template, so nothing tells a system message from the text; put it into the question"),
        (REFUSES, r"it refuses a system message; put it into the question \(TemplateError: no system role\)"),
        (DROPS, "it leaves out a system message; put it into the question"),
    ],
)
def test_a_system_message_without_a_place_is_refused(tokenizer: Any, template: str | None, says: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        build_prompt(tokenizer, "text\n", "question", "be brief")
    assert build_prompt(tokenizer, "text\n", "question").question


def test_a_template_that_shows_the_text_twice_or_fails_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TWICE
    with pytest.raises(InputError, match="shows the user's message once, got 2 times"):
        build_prompt(tokenizer, "text\n", "question")
    tokenizer.chat_template = "{{ messages[7].content.x.y }}"
    with pytest.raises(InputError, match="it refuses a user's message"):
        build_prompt(tokenizer, "text\n", "question")
