"""farkv: run the context that your memory cannot hold, under hard byte limits, with a receipt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farkv.errors import FarKVError

if TYPE_CHECKING:
    from farkv import methods as methods
    from farkv.calibrate.plan import Plan
    from farkv.calibrate.profile import Profile
    from farkv.hf.answer import ask
    from farkv.hf.attach import attach
    from farkv.hf.session import load_cache
    from farkv.math.allocate import allocate
    from farkv.measure.profile import profile
    from farkv.methods import XKV, Full, InfiniGen

__all__ = [
    "XKV",
    "FarKVError",
    "Full",
    "InfiniGen",
    "Plan",
    "Profile",
    "allocate",
    "ask",
    "attach",
    "load_cache",
    "profile",
]

# Names that need torch or transformers are imported on first use: it takes seconds, and `farkv` must hear Ctrl-C then.
_LAZY = {
    "Full": "farkv.methods",
    "InfiniGen": "farkv.methods",
    "Plan": "farkv.calibrate.plan",
    "Profile": "farkv.calibrate.profile",
    "XKV": "farkv.methods",
    "allocate": "farkv.math.allocate",
    "ask": "farkv.hf.answer",
    "attach": "farkv.hf.attach",
    "load_cache": "farkv.hf.session",
    "profile": "farkv.measure.profile",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "methods":
        return import_module("farkv.methods")
    if name not in _LAZY:
        raise AttributeError(f"module 'farkv' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return what there is to use, whether it was imported yet or not."""
    return sorted({*__all__, "methods"})
