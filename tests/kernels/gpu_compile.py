"""Compile GPU kernels for Hopper, down to machine code, without a GPU; print a line per kernel.

In: "select" or "attend", a part of them.

A program of its own: in the tests' process the kernels are interpreted. A stand-in tells Triton what device there
would be, and every launch ends after compilation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from farkv.kernels.gpu import Gpu
from farkv.kernels.native import IndexView, Rows
from farkv.kernels.near_copies import NearCopies
from farkv.math.logits import Logits

HEADS, GROUP, DIM, TOKENS = 2, 4, 64, 2048
WIDTHS = {"plain": 2 * DIM, "int8": 2 * DIM + 8, "int4": DIM + 16}


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stop_before_launch() -> None:
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(self.__name__, len(kernel.asm["cubin"]), flush=True)
        return kernel

    JITFunction.run = compile_alone


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(1, *shape, dtype=dtype)


def compile_select(kernels: Any, q: torch.Tensor, n: torch.Tensor, positions: torch.Tensor) -> None:
    for wide, softcap, held in ((8, None, n), (1, 30.0, TOKENS)):
        codes = zeros(HEADS, TOKENS, 16, dtype=torch.int8)
        floats = {"dtype": torch.float32}
        index = IndexView(codes, zeros(HEADS, DIM, 32, **floats), zeros(HEADS, 512, wide, **floats))
        kernels.select(q, index, Logits(0.1, softcap), cap=400, n=held, sinks=4, taken=positions)


def compile_attend(kernels: Any, q: torch.Tensor, n: torch.Tensor, positions: torch.Tensor) -> None:
    counts = zeros(HEADS, dtype=torch.int32)
    for form, width in WIDTHS.items():
        data = zeros(HEADS, TOKENS, width, dtype=torch.bfloat16 if form == "plain" else torch.uint8)
        rows = Rows(data, DIM, DIM, form)
        kernels.attend(q, rows, Logits(0.1), positions=None, n=n, sinks=torch.zeros(HEADS * GROUP))
        kernels.attend(q, rows, Logits(0.1, 30.0), positions=positions, n=TOKENS, tail=5, counts=counts)
    pool, out = zeros(HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16), zeros(HEADS, 60, 2 * DIM, dtype=torch.bfloat16)
    # The launch itself: rows that lie in host memory, as all do here, would be the CPU's to move.
    flat = positions.view(-1)
    kernels._gather.run_gather(pool, flat, flat, out.view(-1, 2 * DIM), kernels.blocks.gather)
    copies = NearCopies(out, zeros(HEADS, TOKENS, dtype=torch.int32))
    kernels.fetch(pool, positions, out, torch.zeros(1, dtype=torch.int64), counts=counts, copies=copies)


def main(part: str) -> None:
    driver.set_active(Hopper())
    stop_before_launch()
    kernels: Any = Gpu()
    kernels._check_rows = lambda rows: None
    kernels._lend = lambda name, size, like: torch.empty(size[0], dtype=size[1])
    q, n = zeros(HEADS * GROUP, 1, DIM, dtype=torch.bfloat16), torch.tensor(TOKENS - 9, dtype=torch.int32)
    {"select": compile_select, "attend": compile_attend}[part](kernels, q, n, zeros(HEADS, 60))


if __name__ == "__main__":
    main(sys.argv[1])
