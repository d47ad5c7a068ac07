"""Ask one question about one text: the way every command and evaluation takes.

In: a handle, a tokenizer, text and question. Out: the answer. Prefill covers the text alone; the question's tokens
go through the method one by one, as decode steps do, so that no dense pass reads the question for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from farkv._axes import Tensor
from farkv.config import check_sampling
from farkv.errors import CacheStateError
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.prompt import CHUNK_TOKENS, Prompt
from farkv.hf.state import MOST_SHARED, holds_states
from farkv.math.draft_length import MOST_DRAFTED

# Tokens of an answer where nothing else is said.
NEW_TOKENS = 256


class Decoding(NamedTuple):
    """How the answer is generated; greedy unless a temperature is given."""

    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    # Tokens of the text that are read at once; None: 2048, or all where a plan lets layers be evicted as they are read.
    chunk_tokens: int | None = None
    # Draw from the likeliest tokens alone: those that hold this share, or so many. None: as the model's own
    # generation_config says.
    top_p: float | None = None
    top_k: int | None = None
    # Full attention's own answer, from sparse drafts; the question is then read densely, with the text.
    exact: bool = False

    def count_room(self) -> int:
        """Return the tokens behind a prompt that a cache must have room for, drafted ones included."""
        return self.max_new_tokens + (MOST_DRAFTED if self.exact else 0)


def ignore(done: int, total: int) -> None:
    """Take no notice of progress."""


class Listener(NamedTuple):
    """Who is told about progress: prefilled tokens of how many, pieces of the answer, tokens of at most so many."""

    on_prefill: Callable[[int, int], None] = ignore
    on_text: Callable[[str], None] = lambda piece: None
    on_token: Callable[[int, int], None] = ignore


class PieceStreamer(TextStreamer):
    """Hands finished pieces of the answer to a listener, and holds its tokens."""

    def __init__(self, tokenizer: Any, listener: Listener, most: int):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.listener, self.most, self.tokens = listener, most, list[int]()

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then every token."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self.tokens += value.reshape(-1).tolist()
        self.listener.on_token(len(self.tokens), self.most)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on."""
        if text:
            self.listener.on_text(text)


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
    done, total = 0, len(tokens)
    sizes, last = cut_text(total - n_last, chunk), cut_text(n_last, chunk)
    listener.on_prefill(0, total)
    for size in sizes + last:
        if n_last and done == total - n_last:
            cache.mark()
        part = torch.tensor([tokens[done : done + size]], device=handle.device)
        with telling_blocks(handle, listener.on_prefill, (done, size, total)):
            handle.decoder(input_ids=part, past_key_values=cache, use_cache=True)
        done += size
        listener.on_prefill(done, total)


@contextmanager
def telling_blocks(handle: Handle, tell: Callable[[int, int], None], at: tuple[int, int, int]) -> Iterator[None]:
    """Tell after every block how much of a pass is done: on a large model one pass may take minutes.

    Args:
        at: tokens that were read before, those of the pass, and those of the text.
    """
    done, size, total = at
    blocks = [] if tell is ignore else handle.blocks
    hooks = [
        block.register_forward_hook(lambda *_, i=i: tell(done + size * i // len(blocks), total))
        for i, block in enumerate(blocks, start=1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cut_text(n_tokens: int, chunk: int) -> list[int]:
    """Return the sizes of the passes that read a text: `chunk` each, and the rest.

    A pass of one token is a decode step, so none is left alone at the end.
    """
    sizes = [min(chunk, n_tokens - start) for start in range(0, n_tokens, chunk)]
    if len(sizes) > 1 and sizes[-1] == 1 < sizes[-2] - 1:
        sizes[-2:] = [sizes[-2] - 1, 2]
    return sizes


@torch.no_grad()
def feed(
    handle: Handle, cache: FarCache, tokens: list[int], tell: Callable[[int, int], None] = ignore
) -> Tensor | None:
    """Feed tokens one by one, as decode steps; return the last logits, [1, vocabulary]."""
    logits = None
    for n, token in enumerate(tokens):
        tell(n, len(tokens))
        step = torch.tensor([[token]], device=handle.device)
        logits = handle.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def read_question(handle: Handle, cache: FarCache, prompt: Prompt, tell: Callable[[int, int], None] = ignore) -> Prompt:
    """Feed the question but its last token to a cache that has read the text; return what is left of the prompt."""
    # Until all is read, no step is one of the answer.
    cache.account.prompt_tokens = prompt.n_tokens
    feed(handle, cache, prompt.question[:-1], tell)
    return prompt.read_question()


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
    prompt = prompt.read_question() if decoding.exact else prompt
    prefill(handle, cache, prompt.text[cache.get_seq_length() :], decoding.chunk_tokens, listener)
    return answer(handle, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)


def answer(
    handle: Handle, tokenizer: Any, prompt: Prompt, *, cache: FarCache, decoding: Decoding, listener: Listener
) -> str:
    """Feed the question to a cache that has read the text, generate the answer, and return it.

    Stopped by Ctrl-C, it leaves a cache that holds whole tokens, and an account of those that were made; the listener
    has got them all.
    """
    check_sampling(decoding.temperature, decoding.top_p, decoding.top_k)
    if not decoding.exact:
        prompt = read_question(handle, cache, prompt)
    ids = torch.tensor([prompt.text + prompt.question], device=handle.device)
    streamer = PieceStreamer(tokenizer, listener, decoding.max_new_tokens)
    options = list_options(decoding, tokenizer)
    try:
        out = handle.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            streamer=streamer,
            exact=decoding.exact,
            **options,
        )
    except KeyboardInterrupt:
        # What is held back of the last word was said too.
        streamer.end()
        with suppress(CacheStateError):
            cache.settle()
        raise
    finally:
        cache.account.context_tokens = prompt.n_tokens
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def list_options(decoding: Decoding, tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of `generate` that say how to decode."""
    options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.temperature > 0}
    if decoding.temperature > 0:
        chosen = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        options |= {name: value for name, value in chosen.items() if value is not None}
    else:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if decoding.stop:
        options |= {"stop_strings": list(decoding.stop), "tokenizer": tokenizer}
    return options
