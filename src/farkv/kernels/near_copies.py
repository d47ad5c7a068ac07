"""Copies of records in near memory, as the GPU kernels find them. No Triton: making one needs none."""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Int, Tensor


class NearCopies(NamedTuple):
    """Copies of records in near memory: rows [B, Hkv, N, W], and per pool row the slot of its copy, -1 without one."""

    rows: Tensor
    slots: Int[Tensor, "B Hkv S"]
