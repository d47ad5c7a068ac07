"""Sessions: a text that was read once, on disk, to be asked again by any process.

In: a cache that has read a text, or a file. Out: the file, or a cache that goes on from the text and reads what it
needs of it, when it needs it. The file is never changed by asking. docs/session-format.md has the format.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.config import QUANT
from farkv.engine.build import Choice
from farkv.engine.setup import Levers
from farkv.errors import CacheStateError, SessionError
from farkv.hf import _compat
from farkv.hf.cache import FarCache
from farkv.hf.handle import CHUNK_TOKENS, Handle, find_handle
from farkv.hf.layer import FarLayer
from farkv.methods import XKV
from farkv.session.file import Saved, write_saved
from farkv.session.pages import list_pages, open_tail, take_text
from farkv.store.far.page_reader import bytes_of
from farkv.store.far.pages import MOST_TOKENS, PageForm
from farkv.store.records import SavedText
from farkv.store.sizes import LayerShape

# Tokens at a text's end that may come out otherwise when something follows it.
MOST_SHARED = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


def save_cache(cache: FarCache, path: str | Path, *, tokenizer: Any = None, text: str = "") -> None:
    """Write the text that a cache has read.

    Args:
        cache: one sequence, unpadded, of which nothing was evicted.
        tokenizer: whose tokens they are; compared when the session is loaded with one.
        text: the text itself, where it is known.

    Raises:
        CacheStateError: this cache does not hold one whole text.
        SessionError, StoreError: the file cannot be written; what was there before still is.
    """
    cache.settle()
    shape = check_whole(cache)
    engine, store = cache.engine, cache.engine.store
    dtype = next(layer.dtype for layer in cache.layers if isinstance(layer, FarLayer))
    form = store.page_form(shape, dtype)
    n_pages = cache.get_seq_length() // form.tokens
    tensors = {"tokens": cache.token_ids, "text": write_text(text)}
    tensors |= {f"tail/{layer}": open_tail(store, layer, form).to("cpu") for layer in store.pool}
    index = engine.selector.list_tensors(engine.records)
    tensors |= {f"index/{name}": tensor for name, tensor in index.items()} | list_unmanaged(cache)
    notes: dict[str, Any] = {
        "identity": cache.identity,
        "tokenizer": identify_tokenizer(tokenizer),
        "page": [form.tokens, form.width, _name(form.dtype)],
        "record": [shape.kv_heads, shape.k_dim, shape.v_dim, _name(dtype)],
        "quant": store.limits.quant,
        "index": engine.selector.describe(),
        "layers": list(store.pool),
        "versions": {"farkv": version("farkv"), "transformers": _compat.version},
    }
    write_saved(
        Path(path), notes, tensors, list_pages(store, form), n_pages * shape.kv_heads * len(store.pool), form.n_bytes
    )


def check_whole(cache: FarCache) -> LayerShape:
    """Return the shape of a cache's records, or raise CacheStateError unless it holds one whole text."""
    store, layers, length = cache.engine.store, cache.engine.layers, cache.get_seq_length()
    shapes = {store.shape(i) for i in layers if length}
    why = ""
    if any(store.evicted.values()):
        why = "some of its records were evicted"
    elif length == 0 or not layers:
        why = "it has read nothing that farkv manages"
    elif store.batch(layers[0]) != 1:
        why = f"it holds {store.batch(layers[0])} sequences"
    elif len(shapes) > 1:
        why = "its layers have records of different sizes"
    elif cache.token_ids.numel() != length:
        why = f"of its {length} tokens {cache.token_ids.numel()} are known (inputs_embeds are not)"
    elif cache.engine.padding.real is not None:
        why = "its text is padded"
    if why:
        raise CacheStateError(f"save: expected a cache that holds one whole text, but {why}")
    return shapes.pop()


def load_cache(
    path: str | Path, model: PreTrainedModel, *, tokens: int = 0, verify: int = 0, tokenizer: Any = None
) -> FarCache:
    """Return a cache that holds a saved text; its records are read from the file when they are needed.

    Args:
        path: a file that `cache.save(path)` wrote.
        model: the model that read the text, attached.
        tokens: length to make room for, text and answer; 0: the text and a little.
        verify: compare this many decode steps with full attention over the same records.
        tokenizer: compared with the one that the session was saved with.

    Raises:
        SessionError: the file is no session, is damaged, or is of another model, dtype, tokenizer or method.
        CacheStateError: the model is not attached.
        CapacityError: a limit cannot hold the session's index, buffers and open pages.
    """
    handle = find_handle(model)
    if handle is None:
        raise CacheStateError("load_cache: the model is not attached; call it inside `with farkv.attach(model):`")
    saved = Saved.open(Path(path))
    try:
        return _load(saved, handle, max(tokens, 0), verify, tokenizer)
    except SessionError as error:
        raise error if str(error).startswith("session ") else SessionError(f"session {path}: {error}") from error


def _load(saved: Saved, handle: Handle, tokens: int, verify: int, tokenizer: Any) -> FarCache:
    check_levers(handle.choice, handle.setting.levers)
    notes = read_notes(saved.notes)
    check_notes(notes, handle, tokenizer)
    page_tokens, width, page_dtype = notes["page"]
    kv_heads, k_dim, v_dim, name = notes["record"]
    dtype, form = _DTYPES[name], PageForm(page_tokens, width, _DTYPES[page_dtype])
    ids = saved.tensor("tokens")
    if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) == 0:
        raise SessionError(f"its tokens are {list(ids.shape)}, {ids.dtype}, expected a row of int64; make it anew")
    n_pages = len(ids) // page_tokens
    if form.n_bytes != saved.page_bytes or saved.n_pages != n_pages * kv_heads * len(notes["layers"]):
        raise SessionError("its pages are not those of its text; make it anew")
    n_tokens = max(tokens, len(ids) + 1)
    cache = handle.make_cache(n_tokens, verify, SavedText(saved.reader, saved.n_pages, form), notes["quant"])
    engine, store = cache.engine, cache.engine.store
    shape = LayerShape(1, kv_heads, k_dim, v_dim, dtype.itemsize)
    if store.page_form(shape, dtype) != form:
        raise SessionError(f"its pages are {form}, expected {store.page_form(shape, dtype)}; make it anew")
    # Refused before anything is read. The text is there; what comes near of it and after it needs room.
    engine.admit(shape, dtype, n_tokens, CHUNK_TOKENS)
    tails = {layer: saved.tensor(f"tail/{layer}") for layer in store.pool}
    if any(t.shape != (1, kv_heads, len(ids) % page_tokens, width) or t.dtype != form.dtype for t in tails.values()):
        raise SessionError("the end of its text has another shape than its pages; make it anew")
    engine.take_text(shape, dtype, lambda: take_text(store, n_pages, tails))
    made, wanted = notes["index"], engine.selector.describe()
    if wanted is not None and made != wanted:
        raise SessionError(
            f"its index was made with {made or 'a method that has none'}, this method needs {wanted}; ask with the "
            "options that the session was made with, or make another session"
        )
    if wanted is not None:
        names = [name for name in saved.names if name.startswith("index/")]
        index = {name.removeprefix("index/"): saved.tensor(name) for name in names}
        engine.selector.take_tensors(index, dtype, engine.records)
    take_unmanaged(cache, saved, handle, len(ids))
    cache.take_text(ids, dtype, handle.device)
    return cache


def check_levers(choice: Choice, levers: Levers) -> None:
    """Raise SessionError where a method does not keep the whole text, or holds some of it where it was read."""
    if choice.keeps and not isinstance(choice.evicts, XKV):
        raise SessionError("a session holds the whole text, and this method evicts some of it; ask with another one")
    if choice.keeps or levers.near is not None:
        raise SessionError("a session holds the whole text, and XKV's levers keep and near do not; ask without them")


def read_notes(notes: dict[str, Any]) -> dict[str, Any]:
    """Return a session's notes, or raise SessionError unless they are of the form that `save_cache` gives them."""
    try:
        tokens, width, dtype = notes["page"]
        heads, k_dim, v_dim, record = notes["record"]
        numbers = (tokens, width, heads, k_dim, v_dim, *notes["layers"])
        plain = all(type(n) is int and 0 <= n < 2**31 for n in numbers) and tokens * width * heads > 0
        # An open page takes memory, however few tokens are in it.
        plain = plain and tokens <= MOST_TOKENS
        plain = plain and notes["quant"] in (None, *QUANT) and isinstance(notes["index"], dict | None)
        if plain and dtype in _DTYPES and record in _DTYPES and len(notes["layers"]) > 0:
            keys = ("identity", "tokenizer", "page", "record", "quant", "index", "layers")
            return {key: notes[key] for key in keys}
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"its notes are not a farkv session's ({error!r}); make it anew") from error
    raise SessionError("its notes are not a farkv session's; make it anew")


def check_notes(notes: dict[str, Any], handle: Handle, tokenizer: Any) -> None:
    """Raise SessionError unless this model, in this dtype, with this tokenizer, read the text."""
    shape, dtype = handle.measure_shape()
    quant, made = handle.setting.limits.quant, notes["tokenizer"]
    pairs = [
        ("model", notes["identity"], handle.identity),
        ("layers", notes["layers"], handle.managed),
        ("records", notes["record"], [shape.kv_heads, shape.k_dim, shape.v_dim, _name(dtype)]),
        ("quant", notes["quant"], notes["quant"] if quant is None else quant),
        ("tokenizer", made, identify_tokenizer(tokenizer) if tokenizer is not None and made else made),
    ]
    for what, got, expected in pairs:
        if got != expected:
            raise SessionError(
                f"its {what}: {_show(got)}, expected {_show(expected)}; use what it was made with, or make another"
            )


def _show(value: Any) -> str:
    return ", ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def identify_tokenizer(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer's words and template, None without one."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word}\0{number}\n".encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()[:32]


# --- layers that are left to Hugging Face -------------------------------------------------------------------


def list_unmanaged(cache: FarCache) -> dict[str, Tensor]:
    """Return what unmanaged layers hold, by name, in host memory."""
    return {
        f"unmanaged/{i}/{name}": tensor.to("cpu")
        for i, layer in enumerate(cache.layers)
        if not isinstance(layer, FarLayer)
        for name, tensor in _compat.export_state(layer).items()
    }


def take_unmanaged(cache: FarCache, saved: Saved, handle: Handle, n_tokens: int) -> None:
    """Give unmanaged layers what they held after `n_tokens`."""
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, FarLayer):
            start = f"unmanaged/{i}/"
            found = {n.removeprefix(start): saved.tensor(n) for n in saved.names if n.startswith(start)}
            placed = {name: tensor.to(handle.device) for name, tensor in found.items()}
            _compat.import_state(layer, placed, handle.unmanaged[i], n_tokens)


# --- one text, several questions ----------------------------------------------------------------------------


def write_text(text: str) -> Tensor:
    """Return a text's UTF-8 bytes.

    Raises:
        SessionError: it is none: half a letter stands in it.
    """
    try:
        data = bytearray(text.encode())
    except UnicodeEncodeError as error:
        raise SessionError(f"the text cannot be written as UTF-8 ({error.reason}); correct it") from error
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


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
    try:
        if data.dtype != torch.uint8:
            raise SessionError(f"session {path}: its text is {data.dtype}, expected bytes; make it anew")
        text = bytes(bytes_of(data)).decode()
    except UnicodeDecodeError as error:
        raise SessionError(f"session {path}: its text is not UTF-8 (byte {error.start}); make it anew") from error
    if not text and not longer:
        raise SessionError(f"session {path}: it was saved without its text; give --file")
    if longer and not longer.startswith(text):
        n = next((i for i, (a, b) in enumerate(zip(longer, text, strict=False)) if a != b), len(longer))
        raise SessionError(
            f"session {path}: expected a file that begins with its {len(text)} characters, they differ at {n}; leave "
            "--file out, or name another session"
        )
    return longer or text


def resume(cache: FarCache, tokens: list[int]) -> None:
    """Let a cache over a session hold what `tokens` begin with; what differs at the session's end is forgotten.

    Raises:
        SessionError: the session holds another text.
    """
    held = cache.token_ids.tolist()
    pairs = enumerate(zip(tokens, held, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(held)))
    # A token may hold bytes of the text and of what follows it: then the text ends a token earlier.
    if len(held) - common > MOST_SHARED:
        raise SessionError(
            f"session: expected a text that begins with its {len(held)} tokens, they differ at {common}; name another"
        )
    cache.step_back(len(held) - common)
