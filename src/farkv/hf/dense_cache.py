"""The stand-in for our cache in a verifying pass: by its type the hooks know that the pass is not one of its own."""

from __future__ import annotations

import copy
from typing import Any

from farkv.hf import _compat
from farkv.hf.layer import FarLayer


class DenseCache(_compat.Cache):
    """The managed layers of a cache, and copies of all others, which cannot step back, but are small."""

    def __init__(self, layers: list[Any]):
        super().__init__(layers=[each if isinstance(each, FarLayer) else copy.deepcopy(each) for each in layers])
