"""farkv: run the context that your memory cannot hold, under hard byte limits, with a receipt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farkv.config import XKV, Full, InfiniGen
from farkv.errors import FarKVError

if TYPE_CHECKING:
    from farkv.hf.attach import attach
    from farkv.hf.measure import profile
    from farkv.hf.session import load_cache
    from farkv.per_model.profile import Profile
    from farkv.per_prompt.allocate import allocate
    from farkv.plan import Plan

__all__ = ["XKV", "FarKVError", "Full", "InfiniGen", "Plan", "Profile", "allocate", "attach", "load_cache", "profile"]

# What needs torch and transformers is imported when it is first asked for: `farkv --help` answers at once.
_LAZY = {
    "Plan": "farkv.plan",
    "Profile": "farkv.per_model.profile",
    "allocate": "farkv.per_prompt.allocate",
    "attach": "farkv.hf.attach",
    "load_cache": "farkv.hf.session",
    "profile": "farkv.hf.measure",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'farkv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
