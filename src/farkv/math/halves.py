"""Rows as pairs of integers of 7 bits, for kernels that multiply integers of 8: plain twin of csrc/halves.h.

x = (high + low / STEPS) / unit, with unit = HALF / max |x|: |error| <= max |x| / (2 HALF STEPS), 2^-14 of a row's
largest. In: rows of float32. Out: twice as many rows, which the kernel rounds; and their products, put together.
"""

from __future__ import annotations

import torch

from farkv._axes import Float32, Tensor

# Sums of two products of 8 bits, the one up to HALF above and below HALF + 1, must not overflow 16 bits.
HALF, STEPS = 63, 126
# The least that a row is divided by: its inverse is finite.
LEAST = 1e-30


def split_rows(rows: Float32[Tensor, "N E"]) -> tuple[Float32[Tensor, "M E"], Float32[Tensor, "N 1"]]:
    """Return high parts, then low ones, and the unit of every row; a row that is not finite has none that is.

    Cost: some ten passes over the rows.
    """
    unit = HALF / rows.abs().amax(1, keepdim=True).clamp_min(LEAST) + (rows * 0).sum(1, keepdim=True)
    scaled = rows * unit
    high = scaled.round()
    return torch.cat([high, (scaled - high) * STEPS]), unit


def join_rows(
    products: Float32[Tensor, "M O"], unit: Float32[Tensor, "N 1"], bias: Float32[Tensor, " O"] | None
) -> Float32[Tensor, "N O"]:
    """Return the products of rows from those of their parts, which are overwritten."""
    high, low = products.chunk(2)
    joined = high.add_(low, alpha=1 / STEPS).div_(unit)
    return joined if bias is None else joined.add_(bias)
