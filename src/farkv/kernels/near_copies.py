"""Near copies of records, as the GPU kernels find them. In a file of its own, so that it can be made without Triton."""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Int, Tensor


class NearCopies(NamedTuple):
    """Copies of records in near memory: rows [B, Hkv, N, W], and per pool row the slot of its copy, -1 without one."""

    rows: Tensor
    slots: Int[Tensor, "B Hkv S"]
