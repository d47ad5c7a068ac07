"""What a model's modules are called with: names and places of arguments differ from model to model.

In: a hook's args and kwargs. Out: our cache, token ids, how many tokens are new.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from farkv.hf.cache import FarCache


def find_cache(args: Any, kwargs: dict[str, Any]) -> FarCache | None:
    """Return our cache among a module's arguments: its name and place differ from model to model."""
    # Asked several times per layer and step, so the usual name comes first.
    cache = kwargs.get("past_key_values")
    if isinstance(cache, FarCache):
        return cache
    for value in (*kwargs.values(), *args):
        if isinstance(value, FarCache):
            return value
    return None


def find_ids(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the token ids that a model is called with, None where it is called with embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def count_new(args: Any, kwargs: dict[str, Any]) -> int:
    """Return how many tokens a decoder is called with."""
    for name in ("inputs_embeds", "input_ids"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[1]
    return args[0].shape[1]
