"""The sequences of another recipe continue in this one's batch: records, padding, index and what it was made of.

In: two recipes of one method and model. Out: one with both batches, each sequence as it was; the other is empty.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Bool, Tensor
from farkv.errors import CacheStateError
from farkv.methods.contract import Recipe
from farkv.methods.indexed import Indexed
from farkv.methods.pages import PagesRecipe
from farkv.methods.sparse import SparseRecipe
from farkv.store.join import admit_join, check_join, join_layer


def join_recipes(recipe: Recipe, other: Recipe) -> None:
    """Join two recipes; shorter sequences are padded on the left.

    Raises:
        CacheStateError: they are not of one method, or not in plain pools.
        CapacityError: a limit cannot hold both; nothing has changed.
    """
    assert isinstance(recipe, SparseRecipe)
    assert isinstance(other, SparseRecipe)
    if recipe is other or describe(recipe) != describe(other):
        raise CacheStateError(
            "join: expected two caches made by one attached model, of one method and the same limits; "
            "make both with new_cache() of the same handle"
        )
    check_join(recipe.store, other.store)
    assert recipe.shape is not None
    assert other.shape is not None
    first = recipe.layers[0]
    n_tokens = max(recipe.store.seen(first), other.store.seen(first))
    shape = recipe.shape._replace(batch=recipe.store.batch(first) + other.store.batch(first))
    room = max(n_tokens, recipe.store.limits.reserve_tokens)
    admit_join(recipe.store, shape, room, recipe.near_need(shape, room, (1, 1)))
    for each in (recipe, other):
        # What was hot would take the room of the joined index.
        each.store.drop_hot()
    recipe.padding.set(join_real(recipe, other, n_tokens))
    recipe.shape = shape
    recipe.pending.clear()
    other.pending.clear()
    for layer in recipe.layers:
        if isinstance(recipe, Indexed):
            assert isinstance(other, Indexed)
            join_index(recipe, other, layer, n_tokens)
        if isinstance(recipe, PagesRecipe):
            # Padding moves the pages: they are made anew.
            recipe.index[layer].clear()
        join_layer(recipe.store, other.store, layer)
    recipe.store.max_error = max(recipe.store.max_error, other.store.max_error)
    for layer in other.layers:
        other.clear(layer)


def describe(recipe: SparseRecipe) -> tuple[Any, ...]:
    """Return what two recipes must have in common."""
    made_of = [getattr(recipe, name, None) for name in ("config", "profile", "fetch_shares", "layers")]
    numbers = recipe.fraction, recipe.sinks, recipe.window, recipe.share_late, recipe.least
    return type(recipe), *made_of, numbers, recipe.store.limits._replace(reserve_tokens=0)


def join_real(recipe: SparseRecipe, other: SparseRecipe, n_tokens: int) -> Bool[Tensor, "B S"] | None:
    """Return which tokens of the joined batch are real; None where all are."""
    parts: list[Tensor] = []
    padded = False
    for each in (recipe, other):
        seen, n_sequences = each.store.seen(each.layers[0]), each.store.batch(each.layers[0])
        real = each.padding.of_tokens(seen)
        padded = padded or real is not None or seen < n_tokens
        if real is None:
            real = torch.ones(1, seen, dtype=torch.bool, device=each.store.device)
        parts.append(torch.nn.functional.pad(real.expand(n_sequences, -1), (n_tokens - seen, 0), value=False))
    return torch.cat(parts) if padded else None


def join_index(recipe: Indexed, other: Indexed, layer: int, n_tokens: int) -> None:
    """Join one layer's indexes, as far as both go; what they lack is indexed when it is next scored."""
    pair = recipe, other
    batches = recipe.store.batch(layer), other.store.batch(layer)
    known = [each for each in pair if each.index[layer].projection is not None]
    lag = max((each.store.length(layer) - each.index[layer].length for each in known), default=0)
    for each in known:
        index = each.index[layer]
        index.crop(index.length - (each.store.length(layer) - lag))
    if recipe.reads_all(layer):
        return
    fitted = [*recipe.get_fitted(layer), *other.get_fitted(layer)]
    samples, strides = join_samples(recipe, other, layer)
    recipe.index[layer].join(other.index[layer], n_tokens - lag, batches)
    recipe.fitted_tokens[layer] = fitted
    recipe.unscored.discard(layer)
    if layer in recipe.grown or layer in other.grown:
        recipe.grown[layer] = n_tokens
    if samples is not None:
        recipe.samples[layer], recipe.strides[layer] = samples, strides


def join_samples(recipe: Indexed, other: Indexed, layer: int) -> tuple[Tensor | None, list[int]]:
    """Return the sampled queries of both, zeros where a sequence needs none any more, and their strides."""
    pair = recipe, other
    found = [each.samples[layer] for each in pair if layer in each.samples]
    if not found:
        return None, []
    n_slots = max(sample.shape[2] for sample in found)
    parts: list[Tensor] = []
    strides: list[int] = []
    for each in pair:
        n_sequences = each.store.batch(layer)
        sample = each.samples.get(layer)
        if sample is None:
            sample = torch.zeros_like(found[0][:1, :, :0]).expand(n_sequences, -1, -1, -1)
        parts.append(torch.nn.functional.pad(sample, (0, 0, 0, n_slots - sample.shape[2])))
        strides += each.strides.get(layer, [1] * n_sequences)
    return torch.cat(parts), strides
