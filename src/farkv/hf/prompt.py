"""What is prompted: text and question, byte for byte, in the frame of a chat template where there is one.

In: a tokenizer, a text, a question. Out: the tokens of the text, and those of the question.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from farkv.config import check_text
from farkv.errors import InputError

# Tokens of a prompt that are read at once, where nothing else is said.
CHUNK_TOKENS = 2048
# Stand for the user's and the system's text while a chat template is rendered: templates may strip what they are given.
_SENTINEL, _SYSTEM = "farkv-content-5d1c", "farkv-system-5d1c"


class Prompt(NamedTuple):
    """Token ids of the text, prefilled, and of the question, fed one by one."""

    text: list[int]
    question: list[int]

    @property
    def n_tokens(self) -> int:
        """Tokens of both."""
        return len(self.text) + len(self.question)

    def read_question(self) -> Prompt:
        """Return the prompt with its question read densely, with the text, but for the last token."""
        return Prompt(self.text + self.question[:-1], self.question[-1:])


def build_prompt(tokenizer: Any, text: str, question: str, system: str = "") -> Prompt:
    """Join text and question byte for byte, tokenise them together, and find where the question begins.

    One newline is put between them if the text does not end in one. A tokenizer with a chat template gets both as
    one user message. A token that holds bytes of both belongs to the question.

    Args:
        system: the system message before it, where the chat template has room for one.

    Raises:
        InputError: there is nothing to read, the tokenizer cannot tell where its tokens stand, or has no template that
            takes such messages.
    """
    if not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file with text, or a question")
    check_text("text", text)
    check_text("question", question)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer {type(tokenizer).__name__}: expected a fast one, which knows token offsets")
    if text and question and not text.endswith("\n"):
        text += "\n"
    templated = bool(getattr(tokenizer, "chat_template", None))
    if system and not templated:
        raise InputError(
            f"system: tokenizer {type(tokenizer).__name__} of {tokenizer.name_or_path or 'this model'} has no chat "
            "template, so nothing tells a system message from the text; put it into the question, or use an instruct "
            "model"
        )
    head, tail = frame_message(tokenizer, system) if templated else ("", "")
    content = head + text + question + tail
    encoded = tokenizer(content, return_offsets_mapping=True, add_special_tokens=not templated)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    end = len(head) + len(text)
    cut = next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(ids))
    # Something must be left to decode from: without a question it is the text's last token.
    cut = min(cut, len(ids) - 1)
    return Prompt(list(ids[:cut]), list(ids[cut:]))


def frame_message(tokenizer: Any, system: str) -> tuple[str, str]:
    """Return what a chat template puts before a user's message, and what behind it.

    Raises:
        InputError: it refuses or leaves out the system's or the user's message.
    """
    check_text("system", system)
    messages = [{"role": "system", "content": _SYSTEM}] if system else []
    messages.append({"role": "user", "content": _SENTINEL})
    name = f"chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
    try:
        frame = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template is a program of its author's.
    except Exception as error:
        what = "a system message; put it into the question" if system else "a user's message; use another tokenizer"
        raise InputError(f"{name}: it refuses {what} ({type(error).__name__}: {error})") from error
    if frame.count(_SENTINEL) != 1:
        raise InputError(f"{name}: expected one that shows the user's message once, got {frame.count(_SENTINEL)} times")
    if system and frame.count(_SYSTEM) != 1:
        raise InputError(f"{name}: it leaves out a system message; put it into the question")
    head, _, tail = frame.partition(_SENTINEL)
    return head.replace(_SYSTEM, system), tail.replace(_SYSTEM, system)
