"""What is read before the question: a text, or the session file that holds it, which is written where it is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from farkv.cli.terminal import say
from farkv.config import format_bytes
from farkv.errors import ConfigError, InputError
from farkv.methods import XKV, Method
from farkv.methods.table import evicts
from farkv.names import check_target
from farkv.quote import quote

if TYPE_CHECKING:
    from farkv.hf.ask import Decoding, Listener
    from farkv.hf.cache import FarCache
    from farkv.hf.handle import Handle
    from farkv.hf.prompt import Prompt


def check_session(path: Path, text: str, methods: list[Method], *, evicts_pool: bool) -> None:
    """Refuse a session that can be neither read nor written, before the model is loaded.

    Args:
        evicts_pool: a full host pool loses records.
    """
    if any(evicts(method) and not isinstance(method, XKV) for method in methods):
        raise ConfigError("--session: stores the whole text, but this method evicts part of it; drop one of them")
    if any(isinstance(method, XKV) and {"keep", "near"} & set(method.levers) for method in methods):
        raise ConfigError("--session: stores the whole text, but XKV's levers keep and near do not; drop one of them")
    shown = quote(path)
    try:
        if path.exists():
            return
        check_target(path)
        is_writable = path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        is_writable = False
    except OSError as error:
        raise InputError(f"--session {shown}: cannot be used ({error.strerror}); choose another name") from error
    if not text.strip():
        raise InputError(f"--session {shown}: there is no such file; to create it, give the text with --file")
    if not is_writable:
        raise InputError(f"--session {shown}: the folder is missing or not writable; create it, or choose another one")
    if evicts_pool:
        raise ConfigError("--evict: evicted records cannot be saved in a session; add --disk, or drop --evict")


class Request(NamedTuple):
    """A text, a question, and the handle and options to answer it with."""

    name: str
    far: Handle
    tokenizer: Any
    text: str
    question: str
    system: str
    decoding: Decoding
    verify: int

    def build_prompt(self, text: str) -> Prompt:
        """Return the tokens of a text and the question, and say what somebody should know of them."""
        from farkv.hf.cautions import check_positions, check_template
        from farkv.hf.prompt import build_prompt

        prompt = build_prompt(self.tokenizer, text, self.question, self.system)
        check_template(self.tokenizer)
        check_positions(self.far.model, prompt.n_tokens, self.decoding.max_new_tokens)
        return prompt


def open_text(request: Request, *, query_aware: bool) -> tuple[Prompt, FarCache]:
    """Return the prompt and an empty cache with room for it."""
    from farkv.hf.prompt import CHUNK_TOKENS

    prompt = request.build_prompt(request.text)
    if query_aware:
        prompt = prompt.read_question()
    tokens = prompt.n_tokens + request.decoding.count_room()
    chunk = request.decoding.chunk_tokens or CHUNK_TOKENS
    return prompt, request.far.new_cache(tokens=tokens, verify=request.verify, chunk_tokens=chunk)


def open_session(request: Request, path: Path, listener: Listener) -> tuple[Prompt, FarCache]:
    """Return the prompt and a cache over the session file, which is created first if it does not exist."""
    from farkv.hf.ask import prefill
    from farkv.hf.prompt import build_prompt
    from farkv.hf.session import load_cache, read_session_text, resume

    reading: FarCache | None = None
    if not path.exists():
        prompt, reading = open_text(request._replace(verify=0), query_aware=False)
        prefill(request.far, reading, prompt.text, request.decoding.chunk_tokens, listener, marks=True)
        reading.save(path, tokenizer=request.tokenizer, text=request.text)
        say(f"session {quote(path)}: {format_bytes(path.stat().st_size)} for {len(prompt.text)} tokens")
        reading.reset()
    # The first question also reads from the file, like all later ones.
    text = read_session_text(path, request.text)
    if reading is not None:
        # What is to be said of it was said.
        prompt = build_prompt(request.tokenizer, text, request.question, request.system)
    else:
        prompt = request.build_prompt(text)
    tokens = prompt.n_tokens + request.decoding.count_room()
    cache = load_cache(path, request.far.model, tokens=tokens, verify=request.verify, tokenizer=request.tokenizer)
    resume(cache, prompt.text)
    if reading is not None:
        cache.account.take_reading(reading.account)
    return prompt, cache
