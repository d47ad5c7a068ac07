"""What a recipe knows of a text besides its records: the index, and how it was made.

In: a recipe that has read a text. Out: tensors and notes for a file; or a new recipe that goes on as the old one would.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Tensor
from farkv.errors import SessionError
from farkv.methods.contract import Recipe
from farkv.methods.infinigen import InfiniGenRecipe
from farkv.store.index import Projection


def describe_index(recipe: Recipe) -> dict[str, Any] | None:
    """Return what must be the same for an index to be of use, None for a method that has none."""
    if not isinstance(recipe, InfiniGenRecipe):
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
    if not isinstance(recipe, InfiniGenRecipe):
        return found
    for layer, index in recipe.index.items():
        if index.projection is not None:
            found |= {f"index/{layer}/{name}": t for name, t in index.projection._asdict().items()}
            found[f"index/{layer}/fitted"] = torch.as_tensor(recipe.fitted_tokens[layer])
        if index.length:
            found[f"index/{layer}/codes"] = index.codes()
        if layer in recipe.samples:
            found[f"index/{layer}/samples"] = recipe.samples[layer]
    return {name: tensor.to("cpu") for name, tensor in found.items()}


def take_tensors(recipe: Recipe, made: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
    """Give an empty recipe the index of a saved text.

    Args:
        made: what `describe_index` said of the recipe that read the text.

    Raises:
        SessionError: the recipe needs an index that the session does not have.
    """
    wanted = describe_index(recipe)
    if not isinstance(recipe, InfiniGenRecipe):
        return
    if made != wanted:
        raise SessionError(
            f"its index was made with {made or 'a method that has none'}, this method needs {wanted}; ask with the "
            "options that the session was made with, or make another session"
        )
    device = recipe.store.device
    for layer, index in recipe.index.items():
        mine = {name.rsplit("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"index/{layer}/")}
        if "fitted" in mine:
            index.projection = Projection(*(mine[name].to(device) for name in Projection._fields))
            recipe.take_fitted(layer, mine["fitted"])
        if "codes" in mine:
            index.append(mine["codes"].to(device))
        if "samples" in mine:
            recipe.samples[layer] = mine["samples"].to(device)
