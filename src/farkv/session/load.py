"""Lets an engine hold a saved text, whose pages stay in the file or go into memory. Nothing in the file is trusted.

In: an open file, an engine, what its caller knows of the model. Out: the engine goes on from the text, or an error.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.account import EXACT, INEXACT
from farkv.config import QUANT
from farkv.engine.build import Roles
from farkv.engine.setup import Levers
from farkv.engine.step import NEVER, Engine
from farkv.errors import SessionError
from farkv.methods import XKV
from farkv.session.file import Saved
from farkv.session.pages import read_text, take_text
from farkv.session.save import describe_text
from farkv.store.far.pages import MOST_TOKENS
from farkv.store.records import SavedText
from farkv.store.sizes import LayerShape

# How messages call the notes, where the word is another.
_WORDS = {
    "identity": "model",
    "record": "records",
    "weights": "weights",
    "every_weight": "trained weights",
    "buffers": "buffers (rotary frequencies, quantised weights)",
    "settings": "configuration",
    "switches": "modules' switches (the active adapter)",
}


class Text(NamedTuple):
    """A saved text: its file, its tokens, how its records are coded, its pages."""

    saved: Saved
    ids: Int[Tensor, " N"]
    quant: str | None
    pages: SavedText


def check_levers(roles: Roles, levers: Levers) -> None:
    """Raise SessionError where a method does not keep the whole text, or holds some of it where it was read."""
    if roles.keeps and not isinstance(roles.evicts, XKV):
        raise SessionError("a session holds the whole text, and this method evicts some of it; ask with another one")
    if roles.keeps or levers.near is not None:
        raise SessionError("a session holds the whole text, and XKV's levers keep and near do not; ask without them")


def open_text(path: Path, quant: str | None) -> Text:
    """Open a saved text, as far as an engine for it must know it.

    Args:
        quant: how records are to be coded; None: as they are.

    Raises:
        SessionError: it is damaged, or its records are coded in another way.
    """
    saved = Saved.open(path)
    try:
        tokens, coding = saved.notes["page"][0], saved.notes["quant"]
    except (LookupError, TypeError) as error:
        raise SessionError(f"its notes are not a farkv session's ({error!r}); make it anew") from error
    # An open page takes memory, however few tokens are in it.
    if type(tokens) is not int or not 0 < tokens <= MOST_TOKENS or coding not in (None, *QUANT):
        raise SessionError("its notes are not a farkv session's; make it anew")
    if quant not in (None, coding):
        raise SessionError(f"its quant: {coding}, expected {quant}; use what it was made with, or make another")
    ids = saved.tensor("tokens")
    if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) == 0:
        raise SessionError(f"its tokens are {list(ids.shape)}, {ids.dtype}, expected a row of int64; make it anew")
    return Text(saved, ids, coding, SavedText(saved.reader, saved.n_pages, tokens))


def fill_engine(
    engine: Engine, text: Text, shape: LayerShape, dtype: torch.dtype, model: dict[str, Any], chunk: int
) -> None:
    """Let an empty engine hold a saved text: index and page tables, or where it stores records in memory, all of them.

    Args:
        shape, dtype: of the model's records.
        model: the notes on it that must be the text's; None for any.
        chunk: tokens of what follows that will be read at once.

    Raises:
        SessionError: the text is of another model, dtype or method, or contradicts itself.
        CapacityError: a limit cannot hold index, buffers and open pages.
        StoreError: a page that goes into memory is damaged or cannot be read.
    """
    saved, store = text.saved, engine.store
    form = store.page_form(shape, dtype, text.pages.page_tokens)
    check_notes(saved.notes, model | describe_text(engine, shape, dtype, form))
    n_pages, n_open = divmod(len(text.ids), form.tokens)
    if (saved.page_bytes, saved.n_pages) != (form.n_bytes, n_pages * shape.kv_heads * len(engine.layers)):
        raise SessionError("its pages are not those of its text; make it anew")
    made, wanted = saved.notes.get("index"), engine.selector.describe()
    if wanted is not None and made != wanted:
        raise SessionError(
            f"its index was made with {made or 'a method that has none'}, this method needs {wanted}; ask with the "
            "options that the session was made with, or make another session"
        )
    # Refused before anything is read. The text is there; what comes near of it and after it needs room.
    engine.admit(shape, dtype, store.limits.reserve_tokens, chunk)
    tails = {layer: saved.tensor(f"tail/{layer}") for layer in store.pool}
    ends = {(tuple(tail.shape), tail.dtype) for tail in tails.values()}
    if ends != {((1, shape.kv_heads, n_open, form.width), form.dtype)}:
        raise SessionError("the end of its text has another shape than its pages; make it anew")
    engine.account.note_exact(read_exact(saved.notes))
    engine.dense_tokens = read_dense(saved.notes, len(text.ids))
    take = take_text if store.page_cache is not None else partial(read_text, form=form, reader=saved.reader)
    engine.take_text(shape, dtype, lambda: take(store, n_pages, tails))
    if wanted is not None:
        engine.selector.take_tensors(saved.tensors("index/"), dtype, engine.records)
    # Until it is asked, other caches may have what its passes take; each pass asks again.
    engine.parts.admission.forget()


def read_dense(notes: dict[str, Any], n_tokens: int) -> int:
    """Return how many of a text's first tokens were computed from everything before them; 0 where nobody noted it.

    Raises:
        SessionError: that is no such number.
    """
    n = notes.get("dense", 0)
    if type(n) is not int or not 0 <= n <= n_tokens:
        raise SessionError(f"its dense: {n!r}, expected a number of its {n_tokens} tokens; make it anew")
    return NEVER if n == n_tokens else n


def read_exact(notes: dict[str, Any]) -> str:
    """Return how near the text's passes came to the plain model; nobody knows of one that does not say.

    Raises:
        SessionError: its word is none of `EXACT`.
    """
    how = notes.get("exact", INEXACT)
    if how not in EXACT:
        raise SessionError(f"its exact: {how!r}, expected {', '.join(EXACT)}; make it anew")
    return how


def check_notes(notes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise SessionError unless a session's notes are these; a tokenizer counts where both are known."""
    for key, value in expected.items():
        got = notes.get(key, "nothing")
        if key not in notes or (got != value and not (key == "tokenizer" and None in (got, value))):
            said, wanted = describe_difference(got, value)
            raise SessionError(
                f"its {_WORDS.get(key, key)}: {said}, expected {wanted}; use what it was made with, or make another"
            )


def describe_difference(got: Any, value: Any) -> tuple[str, str]:
    """Return what a session says and what was expected, in words: of a model, the things that differ by name."""
    if not isinstance(got, dict) or not isinstance(value, dict):
        one, other = (", ".join(map(str, v.values())) if isinstance(v, dict) else str(v) for v in (got, value))
        return one, other
    keys = [key for key in value | got if got.get(key) != value.get(key)]
    # Most of them are digests, which say nothing to anybody.
    pairs = [(str(got.get(key, "none")), str(value.get(key, "none"))) for key in keys]
    shown = [f"{one} for {other}" for one, other in pairs if len(one) < 32 > len(other)]
    names = ", ".join(str(_WORDS.get(key, key)) for key in keys)
    return f"another in its {names}" + (f" ({', '.join(shown)})" if shown else ""), "the model that read the text"
