"""One question about one text in one call, for a notebook. In: a model, a text, a question. Out: answer and receipt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from html import escape
from typing import Any

from transformers import PreTrainedModel

from farkv.config import check_sampling, check_text, read_count
from farkv.errors import ConfigError
from farkv.hf.ask import NEW_TOKENS, Decoding, Listener, ignore
from farkv.hf.ask import ask as ask_prompt
from farkv.hf.attach import attach
from farkv.hf.cautions import check_positions, check_template
from farkv.hf.handle import find_handle
from farkv.hf.prompt import CHUNK_TOKENS, build_prompt
from farkv.methods import Method
from farkv.receipt import Receipt


@dataclasses.dataclass(frozen=True, repr=False)
class Answer:
    """The generated text, as which it prints, and the receipt of what it cost."""

    text: str
    receipt: Receipt

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Answer({self.text!r})"

    def _repr_html_(self) -> str:
        """Return the answer and the receipt for a notebook."""
        return f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre>{self.receipt._repr_html_()}"


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    question: str = "",
    *methods: Method,
    system: str = "",
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    exact: bool = False,
    verify: int = 0,
    chunk_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Answer:
    """Ask one question about one text, with the KV cache in far memory; the model is afterwards what it was.

    Args:
        model: one that `farkv.attach` takes. Attached already, it stays so, by its own method and limits.
        tokenizer: its fast tokenizer; one with a chat template gets text and question as one message.
        question: empty: the text is continued.
        methods: as for `farkv.attach`.
        system: the system message, where the chat template has room for one.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token at every step.
        top_p, top_k: draw from the likeliest tokens alone; None: as the model's generation_config says.
        stop: end the answer after one of these texts, which it contains.
        exact: give full attention's own answer, from sparse drafts.
        verify: compare this many decode steps with full attention.
        chunk_tokens: tokens of the text that are read at once; None: 2048, or what fits.
        on_text: gets the answer piece by piece.
        on_read: gets how many tokens of the text were read, of how many.
        options: `near`, `host`, `disk` and the others of `farkv.attach`.

    Returns:
        The answer: its `str` is the generated text, `.receipt` says what it cost.

    Raises:
        InputError: there is nothing to read, or the tokenizer has no place for a system message.
        ConfigError: an option cannot be used, or contradicts how the model was attached.
        CapacityError: a limit cannot hold the context; nothing was read.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    check_sampling(temperature, top_p, top_k)
    check_text("stop", *stop)
    new, verify = read_count("max_new_tokens", max_new_tokens, 1), read_count("verify", verify)
    handle = find_handle(model)
    if handle is not None and (methods or options):
        named = [*(type(method).__name__ for method in methods), *options]
        raise ConfigError(f"ask: the model is attached already, by its own options; leave {', '.join(named)} out")
    prompt = build_prompt(tokenizer, text, question, system)
    check_template(tokenizer)
    check_positions(model, prompt.n_tokens, new)
    decoding = Decoding(new, temperature, stop, chunk_tokens, top_p, top_k, exact)
    listener = Listener(on_read or ignore, on_text or (lambda piece: None))
    with attach(model, *methods, **options) if handle is None else nullcontext(handle) as far:
        tokens, chunk = prompt.n_tokens + decoding.count_room(), chunk_tokens or CHUNK_TOKENS
        cache = far.new_cache(tokens=tokens, verify=verify, chunk_tokens=chunk)
        said = ask_prompt(far, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)
        return Answer(said, dataclasses.replace(far.receipt(cache), answer=said))
