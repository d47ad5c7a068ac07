"""This machine: its name, kernels, and memory bandwidths as measured by the native kernel.

In: a buffer size. Out: bytes per second of sequential reads and of sorted, prefetched row reads.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.bench.case import Bandwidth
from farkv.calibrate.processor import read_cpu_model
from farkv.errors import ConfigError
from farkv.kernels.native import Native, load_native

# Much larger than any processor cache.
BUFFER_BYTES = 512 << 20
PASSES = 5
ROW_BYTES = (128, 256, 512, 1024)
DENSITIES = (0.01, 0.05, 0.2)


class GatherRate(NamedTuple):
    """Bytes per second of reading rows of `row_bytes`; `density` is the fraction of rows read."""

    row_bytes: int
    density: float
    bytes_per_s: float


def require_native(what: str) -> Native:
    """Return this machine's native kernels.

    Raises:
        ConfigError: there are none.
    """
    native = load_native()
    if native is None:
        raise ConfigError(
            f"{what}: needs the native kernel, which was not built for this machine; install a C compiler, reinstall "
            "farkv, or drop this option"
        )
    return native


def make_buffer(n_bytes: int = BUFFER_BYTES) -> Tensor:
    """Return a buffer to read, with every page written: unwritten pages all map to the same zero page."""
    return torch.ones(n_bytes // 8, dtype=torch.int64).view(torch.uint8)


def draw_positions(n_rows: int, density: float) -> list[Int[Tensor, " N"]]:
    """Return, per pass, distinct random rows in ascending order; passes use different rows so that none are cached."""
    n = max(1, int(density * n_rows))
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
    return [order.roll(-i * n)[:n].sort().values for i in range(PASSES)]


def measure_read(native: Native, buffer: Tensor) -> float:
    """Return the best of PASSES sequential reads, in bytes per second."""
    return max(native.read_bandwidth(buffer) for _ in range(PASSES))


def measure_gather(native: Native, buffer: Tensor, row_bytes: int, density: float) -> GatherRate:
    """Return the best of PASSES reads of random rows in ascending order."""
    passes = draw_positions(buffer.numel() // row_bytes, density)
    return GatherRate(row_bytes, density, max(native.gather_bandwidth(buffer, rows, row_bytes) for rows in passes))


class Machine:
    """This machine's bandwidths: measured on first use and again later; the best value is kept."""

    def __init__(self, native: Native, density: float, *, buffer_bytes: int = BUFFER_BYTES):
        self.native, self.density = native, density
        self.buffer = make_buffer(buffer_bytes)
        self.read = measure_read(native, self.buffer)
        self.rates: dict[int, float] = {}

    def gather(self, row_bytes: int) -> float:
        """Return bytes per second of sorted reads of rows of `row_bytes`."""
        if row_bytes not in self.rates:
            self.rates[row_bytes] = measure_gather(self.native, self.buffer, row_bytes, self.density).bytes_per_s
        return self.rates[row_bytes]

    def measure_again(self) -> None:
        """Measure again: a bandwidth measured on a busy machine would give a floor that flatters the methods."""
        self.read = max(self.read, measure_read(self.native, self.buffer))
        for row_bytes, rate in self.rates.items():
            again = measure_gather(self.native, self.buffer, row_bytes, self.density).bytes_per_s
            self.rates[row_bytes] = max(rate, again)

    @property
    def bandwidth(self) -> Bandwidth:
        """Return both bandwidths."""
        return Bandwidth(self.read, self.gather)


def describe_machine(machine: Machine | None, kernel: str, *, row_bytes: int = 512) -> dict[str, Any]:
    """Return the `machine` object of `--json`; bandwidths are null without a native kernel."""
    return {
        "cpu": read_cpu_model(),
        "threads": torch.get_num_threads(),
        "read_gb_per_s": None if machine is None else round(machine.read / 1e9, 3),
        "gather_gb_per_s": None if machine is None else round(machine.gather(row_bytes) / 1e9, 3),
        "gather_row_bytes": row_bytes,
        "kernel": kernel,
        "versions": {name: version(name) for name in ("farkv", "torch", "transformers")},
    }
