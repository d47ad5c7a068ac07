"""Rows split into integers of 7 bits, and their products put together, in C: one call each for some ten operations.

In: rows of float32, or products. Out: as of the plain twin, `math.halves`, up to rounding. Stateless.
"""

from __future__ import annotations

import ctypes

import torch

from farkv._axes import Float32, Tensor
from farkv.kernels.native_abi import HalvesArgs, load_library
from farkv.kernels.ways import refuse


def split_rows(isa: int, rows: Float32[Tensor, "N E"]) -> tuple[Float32[Tensor, "M E"], Float32[Tensor, "N 1"]]:
    """Return high parts, then low ones, and the unit of every row. Cost: the rows read twice, and twice written."""
    check(rows)
    n, width = rows.shape
    halves, unit = rows.new_empty(2 * n, width), rows.new_empty(n, 1)
    call("farkv_split", isa, HalvesArgs(rows.data_ptr(), halves.data_ptr(), unit.data_ptr(), None, n, width, 0))
    return halves, unit


def join_rows(
    isa: int, products: Float32[Tensor, "M O"], unit: Float32[Tensor, "N 1"], bias: Float32[Tensor, " O"] | None
) -> Float32[Tensor, "N O"]:
    """Return the products of rows from those of their parts, which are overwritten. Cost: these read and written."""
    check(products, unit, *(() if bias is None else (bias,)))
    n, width = len(unit), products.shape[1]
    if len(products) != 2 * n or (bias is not None and bias.numel() != width):
        refuse("products of high and low parts of as many rows as units, and a bias of their width", products)
    pointers = [None, products.data_ptr(), unit.data_ptr(), None if bias is None else bias.data_ptr()]
    call("farkv_join", isa, HalvesArgs(*pointers, n, width, 0))
    return products[:n]


def check(*parts: Tensor) -> None:
    """Check that C may read them."""
    for part in parts:
        if part.dtype is not torch.float32 or not part.is_cpu or not part.is_contiguous():
            refuse("contiguous float32 in CPU memory", part)


def call(name: str, isa: int, args: HalvesArgs) -> None:
    """Call a kernel on torch's threads."""
    args.threads = torch.get_num_threads()
    library = load_library()
    assert library is not None
    getattr(library, name)(isa, ctypes.addressof(args))
