"""Records that need not be brought near, as the GPU kernels find them. Without Triton: who makes one needs none."""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Int, Tensor


class Held(NamedTuple):
    """Records that are near: their rows [B, Hkv, N, W], and per pool row the place of its copy, -1 without one."""

    rows: Tensor
    slots: Int[Tensor, "B Hkv S"]
