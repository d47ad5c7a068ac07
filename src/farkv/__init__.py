"""farkv: run the context that your memory cannot hold, under hard byte limits, with a receipt."""

from __future__ import annotations

from farkv.config import Full, InfiniGen
from farkv.errors import FarKVError
from farkv.hf.attach import attach
from farkv.hf.measure import profile
from farkv.per_model.profile import Profile

__all__ = ["FarKVError", "Full", "InfiniGen", "Profile", "attach", "profile"]
