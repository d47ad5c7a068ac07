"""The recipes: one file per method, each a frozen config and the steps it stands for."""

from __future__ import annotations

from farkv.config import H2O, XKV, Full, InfiniGen, Method, Oracle, PyramidKV, Random, SnapKV, Window
from farkv.methods.contract import Place, Recipe
from farkv.methods.full import FullRecipe
from farkv.methods.h2o import H2ORecipe
from farkv.methods.infinigen import InfiniGenRecipe
from farkv.methods.oracle import OracleRecipe
from farkv.methods.pyramidkv import PyramidKVRecipe
from farkv.methods.random import RandomRecipe
from farkv.methods.snapkv import SnapKVRecipe
from farkv.methods.window import WindowRecipe
from farkv.methods.xkv import XKVRecipe
from farkv.per_model.profile import Profile

__all__ = [
    "H2O", "XKV", "Full", "InfiniGen", "Method", "Oracle", "PyramidKV", "Random", "SnapKV", "Window", "make_recipe",
]  # fmt: skip


def make_recipe(config: Method, place: Place, profile: Profile | None) -> Recipe:
    """Set up the recipe of one cache."""
    match config:
        case InfiniGen():
            recipe: Recipe = InfiniGenRecipe(place, config, profile)
        case Full():
            recipe = FullRecipe(place, config)
        case Window():
            recipe = WindowRecipe(place, config)
        case Random():
            recipe = RandomRecipe(place, config)
        case Oracle():
            recipe = OracleRecipe(place, config)
        case XKV():
            recipe = XKVRecipe(place, config)
        case H2O():
            recipe = H2ORecipe(place, config)
        case SnapKV():
            recipe = SnapKVRecipe(place, config)
        case PyramidKV():
            recipe = PyramidKVRecipe(place, config)
    return recipe
