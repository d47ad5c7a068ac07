"""What a recipe knows of a text besides its records: the index, and how it was made.

In: a recipe that has read a text. Out: tensors and notes for a file, or a new recipe that goes on as the old one would;
and what a pass finds, to put a recipe back where a pass fails.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from farkv._axes import Tensor
from farkv.errors import SessionError
from farkv.methods.contract import Recipe
from farkv.methods.indexed import Indexed
from farkv.methods.sparse import SparseRecipe
from farkv.per_prompt.importance import Observed
from farkv.store.index import LayerIndex, Projection

# --- a text in a file ---------------------------------------------------------------------------------------


def describe_index(recipe: Recipe) -> dict[str, Any] | None:
    """Return what must be the same for an index to be of use, None for a method that has none."""
    if not isinstance(recipe, Indexed):
        return None
    config = recipe.config
    return {
        "paper": config.paper,
        "columns": config.columns,
        "bits": recipe.bits,
        "scans": 2 if recipe.share_late else 1,
    }


def list_tensors(recipe: Recipe) -> dict[str, Tensor]:
    """Return the index of every layer by name, in host memory."""
    found: dict[str, Tensor] = {}
    if not isinstance(recipe, Indexed):
        return found
    for layer, index in recipe.index.items():
        if layer in recipe.grown.keys() - recipe.unscored:
            # What was read in several passes, and asked nothing yet.
            recipe.catch_up(layer, recipe.store.length(layer))
        if index.projection is not None:
            found |= {f"index/{layer}/{name}": t for name, t in index.projection._asdict().items()}
            found[f"index/{layer}/fitted"] = torch.tensor(recipe.fitted_tokens[layer])
            if index.length:
                found[f"index/{layer}/codes"] = index.codes()
        if layer in recipe.samples:
            found[f"index/{layer}/samples"] = recipe.samples[layer]
            found[f"index/{layer}/strides"] = torch.tensor(recipe.strides[layer])
    return {name: tensor.to("cpu") for name, tensor in found.items()}


def take_tensors(recipe: Recipe, made: dict[str, Any] | None, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give an empty recipe the index of a saved text, whose records it holds.

    Args:
        made: what `describe_index` said of the recipe that read the text.
        dtype: of the text's records.

    Raises:
        SessionError: the recipe needs an index that the session does not have, or these tensors are none.
    """
    wanted = describe_index(recipe)
    if not isinstance(recipe, Indexed):
        return
    if made != wanted:
        raise SessionError(
            f"its index was made with {made or 'a method that has none'}, this method needs {wanted}; ask with the "
            "options that the session was made with, or make another session"
        )
    for layer, index in recipe.index.items():
        if recipe.reads_all(layer):
            continue
        start = f"index/{layer}/"
        mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        check_index(recipe, layer, mine, dtype)
        take_layer(recipe, layer, index, mine)


def take_layer(recipe: Indexed, layer: int, index: LayerIndex, mine: dict[str, Tensor]) -> None:
    """Give a layer its index."""
    device = recipe.store.device
    if "fitted" in mine:
        index.projection = Projection(*(mine[name].to(device) for name in Projection._fields))
        # An index that was made with a profile was final, however few tokens there were: no queries were kept.
        least = 0 if "samples" in mine else recipe.final_tokens(layer)
        recipe.take_fitted(layer, mine["fitted"].clamp_min(least))
    if "codes" in mine:
        index.append(mine["codes"].to(device))
    if "samples" in mine:
        recipe.samples[layer] = mine["samples"].to(device)
        recipe.strides[layer] = [int(mine["strides"])]


def check_index(recipe: Indexed, layer: int, mine: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise SessionError unless a layer's index is one of this recipe and text: a file may say anything."""
    names = {*Projection._fields, "fitted"} if "fitted" in mine else set[str]()
    names |= {"samples", "strides"} if "samples" in mine else set()
    names |= {"codes"} if "codes" in mine and "fitted" in mine else set()
    why = "" if mine.keys() == names else f"expected {', '.join(sorted(names)) or 'nothing'}, got {', '.join(mine)}"
    if not names:
        why = "it has neither a projection nor queries to make one of"
    for name in sorted(names) if not why else ():
        tensor = mine[name]
        if not (is_of_text(recipe, layer, name, tensor, dtype) and bool(torch.isfinite(tensor).all())):
            why = why or f"{name} of {list(tensor.shape)}, {tensor.dtype}, is not one of this text"
    if why:
        raise SessionError(f"its index of layer {layer}: {why}; make it anew")


def is_of_text(recipe: Indexed, layer: int, name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a tensor of an index has the type and sizes that this recipe and text give it."""
    assert recipe.shape is not None
    heads, dim, n_tokens = recipe.shape.kv_heads, recipe.shape.k_dim, recipe.store.length(layer)
    columns = recipe.count_columns(dim, recipe.shape.record_bytes)
    sizes = {"query": (1, heads, dim, columns), "key": (1, heads, dim, columns), "mean": (1, heads, 1, dim)}
    sizes["scale"] = (1, heads, 1, columns)
    got = tuple(tensor.shape)
    if name in sizes:
        return got == sizes[name] and tensor.dtype == torch.float32
    if name in ("fitted", "strides"):
        return got == (1,) and tensor.dtype == torch.int64 and 1 <= int(tensor) <= n_tokens
    if len(got) != 4 or not 0 < got[2] <= n_tokens:
        return False
    if name == "samples":
        return (got[0], got[3], got[1] % heads) == (1, dim, 0) and got[1] > 0 and tensor.dtype == dtype
    width = columns * (recipe.bits or 8) // 8
    # The paper's codes are keys as the model makes them.
    return (got[0], got[1], got[3]) == (1, heads, width) and tensor.dtype == (dtype if recipe.bits == 0 else torch.int8)


# --- a pass that fails --------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a pass changes of a recipe besides the records: of every layer, as the pass found it."""

    real: Tensor | None
    observed: dict[int, Observed]
    # Sums that a pass adds to, where marks are sums.
    sums: dict[int, Tensor]
    samples: dict[int, Tensor]
    strides: dict[int, list[int]]
    fitted: dict[int, list[int]]
    grown: dict[int, int]
    unscored: set[int]
    projections: dict[int, Projection | None]


def note_state(recipe: Recipe) -> State:
    """Note what a pass changes; only sums are copied, because a pass changes nothing else in place."""
    assert isinstance(recipe, SparseRecipe)
    observed = {} if recipe.watcher is None else dict(recipe.watcher.observed)
    sums = {i: recipe.store.kept[i].marks.view().clone() for i in recipe.layers if has_sums(recipe, i)}
    if not isinstance(recipe, Indexed):
        return State(recipe.padding.real, observed, sums, {}, {}, {}, {}, set(), {})
    projections = {layer: index.projection for layer, index in recipe.index.items()}
    known = dict(recipe.samples), dict(recipe.strides), dict(recipe.fitted_tokens)
    phase = dict(recipe.grown), set(recipe.unscored)
    return State(recipe.padding.real, observed, sums, *known, *phase, projections)


def has_sums(recipe: SparseRecipe, layer: int) -> bool:
    """Say whether a layer has marks that passes add to."""
    return recipe.exact_marks and recipe.store.length(layer) > 0


def restore_state(recipe: Recipe, state: State) -> None:
    """Put a recipe back to what was noted; its records are those of then again."""
    assert isinstance(recipe, SparseRecipe)
    recipe.pending.clear()
    recipe.padding.set(state.real)
    if recipe.watcher is not None:
        recipe.watcher.observed = dict(state.observed)
    for layer, sums in state.sums.items():
        marks = recipe.store.kept[layer].marks
        # Where records were evicted meanwhile, those that are left go on with what they have.
        if marks.length == sums.shape[2]:
            marks.view().copy_(sums)
    if not isinstance(recipe, Indexed):
        return
    recipe.samples, recipe.strides = dict(state.samples), dict(state.strides)
    recipe.fitted_tokens = dict(state.fitted)
    recipe.grown, recipe.unscored = dict(state.grown), set(state.unscored)
    for layer, index in recipe.index.items():
        if index.projection is not state.projections[layer]:
            # Codes of another projection mean nothing: the keys are indexed again when they are scored next.
            index.clear()
            index.projection = state.projections[layer]
