"""The recipes: one file per method, each a frozen config and the steps it stands for."""

from __future__ import annotations

from farkv.calibrate.profile import Profile
from farkv.config import H2O, XKV, Full, InfiniGen, LowBit, Method, Oracle, Pages, PyramidKV, Random, SnapKV, Window
from farkv.methods.contract import Place, Recipe
from farkv.methods.full import FullRecipe
from farkv.methods.h2o import H2ORecipe
from farkv.methods.infinigen import InfiniGenRecipe
from farkv.methods.lowbit import LowBitRecipe
from farkv.methods.oracle import OracleRecipe
from farkv.methods.pages import PagesRecipe
from farkv.methods.pyramidkv import PyramidKVRecipe
from farkv.methods.random import RandomRecipe
from farkv.methods.snapkv import SnapKVRecipe
from farkv.methods.window import WindowRecipe
from farkv.methods.xkv import XKVRecipe

__all__ = [
    "H2O", "XKV", "Full", "InfiniGen", "LowBit", "Method", "Oracle", "Pages", "PyramidKV", "Random", "SnapKV", "Window",
    "make_recipe",
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
        case _:
            recipe = make_rival(config, place)
    return recipe


def make_rival(config: H2O | SnapKV | PyramidKV | Pages | LowBit, place: Place) -> Recipe:
    """Set up the recipe of one cache of somebody else's method."""
    match config:
        case H2O():
            return H2ORecipe(place, config)
        case SnapKV():
            return SnapKVRecipe(place, config)
        case PyramidKV():
            return PyramidKVRecipe(place, config)
        case Pages():
            return PagesRecipe(place, config)
        case LowBit():
            return LowBitRecipe(place, config)
