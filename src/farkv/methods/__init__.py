"""The recipes: one file per method, each a frozen config and the steps it stands for."""

from __future__ import annotations

from farkv.config import XKV, Full, InfiniGen, Method, Oracle, Random, Window
from farkv.methods.contract import Place, Recipe
from farkv.methods.full import FullRecipe
from farkv.methods.infinigen import InfiniGenRecipe
from farkv.methods.oracle import OracleRecipe
from farkv.methods.random import RandomRecipe
from farkv.methods.window import WindowRecipe
from farkv.methods.xkv import XKVRecipe
from farkv.per_model.profile import Profile

__all__ = ["XKV", "Full", "InfiniGen", "Method", "Oracle", "Random", "Window", "make_recipe"]


def make_recipe(config: Method, place: Place, profile: Profile | None) -> Recipe:
    """Set up the recipe of one cache."""
    match config:
        case InfiniGen():
            return InfiniGenRecipe(place, config, profile)
        case Full():
            return FullRecipe(place, config)
        case Window():
            return WindowRecipe(place, config)
        case Random():
            return RandomRecipe(place, config)
        case Oracle():
            return OracleRecipe(place, config)
        case XKV():
            return XKVRecipe(place, config)
