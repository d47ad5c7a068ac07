"""Ask one question about one text: the way every command and evaluation takes.

In: a handle, a tokenizer, text and question. Out: the answer. Prefill covers the text alone; the question's tokens
go through the method one by one, as decode steps do, so that no dense pass reads the question for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from farkv._axes import Tensor
from farkv.config import check_text
from farkv.errors import InputError
from farkv.hf.cache import FarCache
from farkv.hf.handle import CHUNK_TOKENS, Handle
from farkv.hf.state import MOST_SHARED, holds_states

# Stands for the user's text while a chat template is rendered, because templates may strip what they are given.
_SENTINEL = "farkv-content-5d1c"


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


class Decoding(NamedTuple):
    """How the answer is generated; greedy unless a temperature is given."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    # Tokens of the text that are read at once; None: 2048, or all where a plan lets layers be evicted as they are read.
    chunk_tokens: int | None = None


class Listener(NamedTuple):
    """Who is told about progress: prefilled tokens of how many, and pieces of the answer."""

    on_prefill: Callable[[int, int], None] = lambda done, total: None
    on_text: Callable[[str], None] = lambda piece: None


class PieceStreamer(TextStreamer):
    """Hands finished pieces of the answer to a callback."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on."""
        if text:
            self.on_text(text)


def build_prompt(tokenizer: Any, text: str, question: str) -> Prompt:
    """Join text and question byte for byte, tokenise them together, and find where the question begins.

    One newline is put between them if the text does not end in one. A tokenizer with a chat template gets both as
    one user message. A token that holds bytes of both belongs to the question.

    Raises:
        InputError: there is nothing to read, or the tokenizer cannot tell where its tokens stand.
    """
    if not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file with text, or a question")
    check_text("text", text)
    check_text("question", question)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer {type(tokenizer).__name__}: expected a fast one, which knows token offsets")
    if text and question and not text.endswith("\n"):
        text += "\n"
    content, start = text + question, 0
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        message = [{"role": "user", "content": _SENTINEL}]
        frame = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        start = frame.index(_SENTINEL)
        content = frame.replace(_SENTINEL, content, 1)
    encoded = tokenizer(content, return_offsets_mapping=True, add_special_tokens=not templated)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    end = start + len(text)
    cut = next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(ids))
    # Something must be left to decode from: without a question it is the text's last token.
    cut = min(cut, len(ids) - 1)
    return Prompt(list(ids[:cut]), list(ids[cut:]))


@torch.no_grad()
def prefill(
    handle: Handle, cache: FarCache, tokens: list[int], chunk: int | None, listener: Listener, *, marks: bool = False
) -> None:
    """Read the text densely into the cache, chunk by chunk, without the LM head.

    Args:
        marks: note the states of layers that cannot step back before the last tokens, which a question may change.
    """
    # What evicts, and what an index is fitted to, waits for the end of the prompt.
    fitting = cache.engine.announce_prompt(cache.get_seq_length() + len(tokens), CHUNK_TOKENS)
    chunk = fitting if chunk is None else chunk
    n_last = MOST_SHARED if marks and len(tokens) > MOST_SHARED and any(map(holds_states, cache.layers)) else 0
    sizes, last = cut_text(len(tokens) - n_last, chunk), cut_text(n_last, chunk)
    done = 0
    for size in sizes + last:
        if n_last and done == len(tokens) - n_last:
            cache.mark()
        part = torch.tensor([tokens[done : done + size]], device=handle.device)
        handle.decoder(input_ids=part, past_key_values=cache, use_cache=True)
        done += size
        listener.on_prefill(done, len(tokens))


def cut_text(n_tokens: int, chunk: int) -> list[int]:
    """Return the sizes of the passes that read a text: `chunk` each, and the rest.

    A pass of one token is a decode step, so none is left alone at the end.
    """
    sizes = [min(chunk, n_tokens - start) for start in range(0, n_tokens, chunk)]
    if len(sizes) > 1 and sizes[-1] == 1 < sizes[-2] - 1:
        sizes[-2:] = [sizes[-2] - 1, 2]
    return sizes


@torch.no_grad()
def feed(handle: Handle, cache: FarCache, tokens: list[int]) -> Tensor | None:
    """Feed tokens one by one, as decode steps; return the last logits, [1, vocabulary]."""
    logits = None
    for token in tokens:
        step = torch.tensor([[token]], device=handle.device)
        logits = handle.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def ask(
    handle: Handle,
    tokenizer: Any,
    prompt: Prompt,
    *,
    cache: FarCache,
    decoding: Decoding | None = None,
    listener: Listener | None = None,
) -> str:
    """Prefill the text, feed the question, generate the answer.

    Args:
        cache: from `handle.new_cache(tokens=...)`, empty or with the first tokens of the text in it.

    Returns:
        The generated text alone.
    """
    decoding, listener = decoding or Decoding(), listener or Listener()
    prefill(handle, cache, prompt.text[cache.get_seq_length() :], decoding.chunk_tokens, listener)
    return answer(handle, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)


def answer(
    handle: Handle, tokenizer: Any, prompt: Prompt, *, cache: FarCache, decoding: Decoding, listener: Listener
) -> str:
    """Feed the question to a cache that has read the text, generate the answer, and return it."""
    # Until all is read, no step is one of the answer.
    cache.account.prompt_tokens = prompt.n_tokens
    feed(handle, cache, prompt.question[:-1])
    ids = torch.tensor([prompt.text + prompt.question], device=handle.device)
    options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.temperature > 0}
    if decoding.temperature > 0:
        options["temperature"] = decoding.temperature
    else:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if decoding.stop:
        options |= {"stop_strings": list(decoding.stop), "tokenizer": tokenizer}
    generate: Any = handle.model.generate
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=PieceStreamer(tokenizer, listener.on_text),
        **options,
    )
    cache.account.context_tokens = prompt.n_tokens
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
