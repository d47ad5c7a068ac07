"""farkv: run the context that your memory cannot hold, under hard byte limits, with a receipt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farkv.config import Full, InfiniGen
from farkv.errors import FarKVError

if TYPE_CHECKING:
    from farkv.hf.attach import attach
    from farkv.hf.measure import profile
    from farkv.per_model.profile import Profile

__all__ = ["FarKVError", "Full", "InfiniGen", "Profile", "attach", "profile"]

# What needs torch and transformers is imported when it is first asked for: `farkv --help` answers at once.
_LAZY = {"attach": "farkv.hf.attach", "profile": "farkv.hf.measure", "Profile": "farkv.per_model.profile"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'farkv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
