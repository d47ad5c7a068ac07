"""The axis letters used in tensor annotations everywhere, and the annotation types.

B   sequences of a batch              D   head dimension (Dk of keys, Dv of values where they differ)
T   new tokens of this forward pass   W   record width: Dk + Dv
S   tokens in the cache               R   index columns
Hq  query heads                       K   chosen records
Hkv KV heads                          L   layers
G   query heads of one KV head        C   capacity, in tokens
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Float32, Int, Int8, Shaped
from torch import Tensor

__all__ = ["Bool", "Float", "Float32", "Int", "Int8", "Shaped", "Tensor"]
