"""Saves the text that an engine has read. In: an engine, and what its caller knows of text and model. Out: a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from farkv._axes import Int, Tensor
from farkv.engine.step import Engine
from farkv.engine.usage import find_exact
from farkv.errors import CacheStateError, SessionError
from farkv.session.file import write_saved
from farkv.session.pages import list_pages, open_tail
from farkv.store.far.pages import PageForm
from farkv.store.sizes import LayerShape


def save_text(
    path: Path, engine: Engine, ids: Int[Tensor, " N"], text: str, model: dict[str, Any], others: dict[str, Tensor]
) -> None:
    """Write the text that an engine has read.

    Args:
        ids, text: its tokens, and the text itself where it is known.
        model: notes on who read it.
        others: small tensors in host memory that belong to it.

    Raises:
        CacheStateError: the engine does not hold one whole text.
        SessionError, StoreError: the file cannot be written; what was there before still is.
    """
    shape, store = check_whole(engine, ids), engine.store
    codec, rows = store.codecs.get(engine.layers[0]), store.pool[engine.layers[0]]
    dtype = rows.dtype if codec is None else codec.dtype
    form = store.page_form(shape, dtype)
    notes = model | describe_text(engine, shape, dtype, form)
    notes |= {"index": engine.selector.describe(), "exact": find_exact(engine)}
    notes["dense"] = min(len(ids), engine.dense_tokens)
    tensors = {"tokens": ids, "text": encode_text(text)} | others
    tensors |= {f"tail/{layer}": open_tail(store, layer, form).to("cpu") for layer in store.pool}
    tensors |= {f"index/{name}": t for name, t in engine.selector.list_tensors(engine.records).items()}
    n_pages = len(ids) // form.tokens * shape.kv_heads * len(store.pool)
    write_saved(path, notes, tensors, list_pages(store, form), n_pages, form.n_bytes)


def check_whole(engine: Engine, ids: Tensor) -> LayerShape:
    """Return the shape of an engine's records, or raise CacheStateError unless it holds one whole text."""
    store, layers = engine.store, engine.layers
    length = engine.count_tokens(layers[0]) if layers else 0
    shapes = {store.shape(i) for i in layers if length}
    why = ""
    if any(store.evicted.values()):
        why = "some of its records were evicted"
    elif length == 0:
        why = "it has read nothing that farkv manages"
    elif store.batch(layers[0]) != 1:
        why = f"it holds {store.batch(layers[0])} sequences"
    elif len(shapes) > 1:
        why = "its layers have records of different sizes"
    elif len(ids) != length:
        why = f"of its {length} tokens {len(ids)} are known (inputs_embeds are not)"
    elif engine.padding.real is not None:
        why = "its text is padded"
    if why:
        raise CacheStateError(f"save: expected a cache that holds one whole text, but {why}")
    return shapes.pop()


def describe_text(engine: Engine, shape: LayerShape, dtype: torch.dtype, form: PageForm) -> dict[str, Any]:
    """Return the notes on how an engine keeps a text of such records, in such pages."""
    return {
        "layers": engine.layers,
        "record": [shape.kv_heads, shape.k_dim, shape.v_dim, str(dtype).removeprefix("torch.")],
        "quant": engine.store.limits.quant,
        "page": [form.tokens, form.width, str(form.dtype).removeprefix("torch.")],
    }


def encode_text(text: str) -> Tensor:
    """Return a text's UTF-8 bytes.

    Raises:
        SessionError: it is none: half a letter stands in it.
    """
    try:
        return torch.from_numpy(np.frombuffer(bytearray(text.encode()), np.uint8))
    except UnicodeEncodeError as error:
        raise SessionError(f"the text cannot be written as UTF-8 ({error.reason}); correct it") from error
