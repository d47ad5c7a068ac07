"""What a model's modules are called with: names and places of arguments differ from model to model.

In: a hook's args and kwargs. Out: our cache, token ids, how many tokens are new.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from farkv.hf.cache import FarCache
from farkv.hf.dense_cache import DenseCache


def find_cache(args: Any, kwargs: dict[str, Any]) -> FarCache | None:
    """Return our cache among a module's arguments: its name and place differ from model to model."""
    return find_one(args, kwargs, FarCache)


def find_layers(args: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    """Return the layers of the cache that holds layers of ours: ours, or the stand-in of a verifying pass."""
    cache = find_one(args, kwargs, (FarCache, DenseCache))
    return None if cache is None else cache.layers


def find_one(args: Any, kwargs: dict[str, Any], kinds: Any) -> Any:
    """Return the first argument of these kinds."""
    # Asked several times per layer and step, so the usual name comes first.
    cache = kwargs.get("past_key_values")
    if isinstance(cache, kinds):
        return cache
    for value in (*kwargs.values(), *args):
        if isinstance(value, kinds):
            return value
    return None


def replace_cache(args: Any, kwargs: dict[str, Any], other: Any) -> tuple[Any, dict[str, Any]]:
    """Return the arguments with another cache in the place of ours."""
    args = tuple(other if isinstance(value, FarCache) else value for value in args)
    return args, {name: other if isinstance(value, FarCache) else value for name, value in kwargs.items()}


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
