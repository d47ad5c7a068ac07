"""Sessions: a text that was read once, on disk, to be asked again by any process.

In: a file and an attached model. Out: a cache that goes on from the text: an ordinary one where memory may hold the
text, else one that reads what it needs of it when it needs it. The file is never changed by asking. `session/` knows
the file, docs/session-format.md has the format.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from farkv.config import read_count
from farkv.errors import CacheStateError, CapacityError, ConfigError, SessionError
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle, find_handle
from farkv.hf.identity import identify_tokenizer
from farkv.hf.prompt import CHUNK_TOKENS
from farkv.hf.state import MOST_SHARED, holds_states
from farkv.hf.unmanaged import take_marked, take_unmanaged
from farkv.quote import quote
from farkv.session.file import Saved
from farkv.session.load import Text, check_levers, fill_engine, open_text
from farkv.store.far.page_reader import bytes_of
from farkv.store.memory import count_memory


def load_cache(
    path: str | Path, model: PreTrainedModel, *, tokens: int = 0, verify: int = 0, tokenizer: Any = None
) -> FarCache:
    """Return a cache that holds a saved text, in memory where it fits; else pages are read when they are needed.

    Args:
        path: a file that `cache.save(path)` wrote.
        model: the model that read the text, attached.
        tokens: length to make room for, text and answer; 0: the text and a little. The text goes into memory where
            the host limit holds so many tokens; with 0, twice the text: room to grow, or for one copy.
        verify: compare this many decode steps with full attention over the same records.
        tokenizer: compared with the one that the session was saved with.

    Raises:
        SessionError: the file is no session, is damaged, or is of another model, dtype, tokenizer or method.
        CacheStateError: the model is not attached.
        CapacityError: a limit cannot hold the session's index, buffers and open pages.
    """
    tokens, verify = read_count("load_cache: tokens", tokens), read_count("load_cache: verify", verify)
    handle = find_handle(model)
    if handle is None:
        raise CacheStateError("load_cache: the model is not attached; call it inside `with farkv.attach(model):`")
    try:
        check_levers(handle.roles, handle.setting.levers)
        text = open_text(Path(path), handle.setting.limits.quant)
        if verify and text.quant is not None:
            raise ConfigError(
                f"verify: expected a session of records as the model made them, got {text.quant}: what they were "
                "before is gone, so there is nothing to compare with; leave verify out"
            )
        if not handle.managed:
            raise SessionError(
                "its layers are managed by another method, and this one manages none of the model's; ask with the "
                "method that the session was made with"
            )
        n_tokens, (shape, dtype) = len(text.ids), handle.measure_shape()
        cache = make_cache(handle, text, tokens, verify)
        mine = {"identity": handle.identity.get(), "tokenizer": identify_tokenizer(tokenizer)}
        fill_engine(cache.engine, text, shape, dtype, mine, CHUNK_TOKENS)
        take_unmanaged(cache.layers, text.saved.tensors("unmanaged/"), handle.unmanaged, n_tokens)
        if (at := text.saved.notes.get("marked")) is not None:
            cache.marked = take_marked(cache.layers, text.saved.tensors("marked/"), handle.unmanaged, at, n_tokens)
        cache.take_text(text.ids, dtype, handle.device)
    except SessionError as error:
        raise error if str(error).startswith("session ") else SessionError(f"session {quote(path)}: {error}") from error
    return cache


def make_cache(handle: Handle, text: Text, tokens: int, verify: int) -> FarCache:
    """Return an empty cache for a saved text: an ordinary one where memory may hold the text, else one over its pages.

    Pages stay in the file where `disk` says so, where a full pool evicts, where the host limit has no room, and where
    without one they are more than half of this machine's memory.
    """
    limits, reserve = handle.setting.limits, max(tokens, len(text.ids) + 1)
    pages, (shape, dtype) = text.pages, handle.measure_shape()
    is_large = limits.host is None and 2 * text.saved.n_pages * text.saved.page_bytes > count_memory()
    if limits.disk is None and limits.evict == "refuse" and not is_large:
        cache = handle.make_cache(reserve, verify, None, text.quant)
        with contextlib.suppress(CapacityError):
            cache.engine.admit(shape, dtype, reserve if tokens else 2 * reserve, CHUNK_TOKENS)
            return cache
    return handle.make_cache(reserve, verify, pages, text.quant)


def read_session_text(path: str | Path, longer: str = "") -> str:
    """Return the text of a session, or `longer` where that begins with it.

    Raises:
        SessionError: the session holds no text, or another one.
    """
    saved = Saved.open(Path(path))
    try:
        data = saved.tensor("text")
    finally:
        saved.close()
    if data.dtype != torch.uint8:
        raise SessionError(f"session {quote(path)}: its text is {data.dtype}, expected bytes; make it anew")
    try:
        text = bytes(bytes_of(data)).decode()
    except UnicodeDecodeError as error:
        raise SessionError(
            f"session {quote(path)}: its text is not UTF-8 (byte {error.start}); make it anew"
        ) from error
    if not text and not longer:
        raise SessionError(f"session {quote(path)}: it was saved without its text; give --file")
    if longer and not longer.startswith(text):
        raise SessionError(
            f"session {quote(path)}: expected a file that begins with its {len(text)} characters, they differ at "
            f"{count_common(text, longer)}; leave --file out, or name another session"
        )
    return longer or text


def resume(cache: FarCache, tokens: list[int]) -> None:
    """Let a cache over a session hold what `tokens` begin with; what differs at the session's end is forgotten.

    Where layers hold states, which cannot step back, it returns to where they were noted: the rest is read again.

    Raises:
        SessionError: the session holds another text, or its states were not noted.
    """
    held = cache.token_ids.tolist()
    common = count_common(held, tokens)
    # A token may hold bytes of the text and of what follows it: then the text ends a token earlier.
    if len(held) - common > MOST_SHARED:
        raise SessionError(
            f"session: expected a text that begins with its {len(held)} tokens, they differ at {common}; name another"
        )
    if common < len(held) and any(map(holds_states, cache.layers)):
        if cache.marked is None or cache.marked.tokens > common:
            raise SessionError(
                f"session: the question changes the text's last {len(held) - common} tokens, and layers of this model "
                f"cannot step back; write the session by farkv run, or call cache.mark() {MOST_SHARED} tokens before "
                "the end of the text"
            )
        common = cache.marked.tokens
    cache.step_back(len(held) - common)


def count_common(one: Any, other: Any) -> int:
    """Return how many items two sequences have in common from their begin on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
