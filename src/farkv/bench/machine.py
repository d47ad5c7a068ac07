"""What this machine can do: its name, its kernels, and its bandwidths, measured by the native kernel.

In: nothing but a buffer's size. Out: bytes per second of sequential reads and of sorted, prefetched row reads.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from farkv._axes import Int, Tensor
from farkv.bench.case import Bandwidth
from farkv.calibrate.crossover import read_cpu_model
from farkv.errors import ConfigError
from farkv.kernels.native import Native, load_native

# Much larger than any cache of a processor.
BUFFER_BYTES = 512 << 20
PASSES = 5
ROW_BYTES = (128, 256, 512, 1024)
DENSITIES = (0.01, 0.05, 0.2)


class GatherRate(NamedTuple):
    """Bytes per second of reading rows of `row_bytes`, of which this share is read."""

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
            f"{what}: no native kernel: it was not built, or not for this machine; install a C compiler and farkv "
            "again, or leave this out"
        )
    return native


def make_buffer(n_bytes: int = BUFFER_BYTES) -> Tensor:
    """Return memory to read, every page of it written: pages that were never written are all the same one."""
    return torch.ones(n_bytes // 8, dtype=torch.int64).view(torch.uint8)


def draw_positions(n_rows: int, density: float) -> list[Int[Tensor, " N"]]:
    """Return random rows, ascending, each once, for every pass: others each time, or they would lie in a cache."""
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
    """This machine's bandwidths, each measured when it is first asked for, again at the end, and the best kept."""

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
        """Measure once more: a floor that was measured while the machine was busy would flatter what is held to it."""
        self.read = max(self.read, measure_read(self.native, self.buffer))
        for row_bytes, rate in self.rates.items():
            again = measure_gather(self.native, self.buffer, row_bytes, self.density).bytes_per_s
            self.rates[row_bytes] = max(rate, again)

    @property
    def bandwidth(self) -> Bandwidth:
        """Return both."""
        return Bandwidth(self.read, self.gather)


def describe_machine(machine: Machine | None, kernel: str, *, row_bytes: int = 512) -> dict[str, Any]:
    """Return the `machine` object of `--json`: bandwidths are null where no native kernel measures them."""
    return {
        "cpu": read_cpu_model(),
        "threads": torch.get_num_threads(),
        "read_gb_per_s": None if machine is None else round(machine.read / 1e9, 3),
        "gather_gb_per_s": None if machine is None else round(machine.gather(row_bytes) / 1e9, 3),
        "gather_row_bytes": row_bytes,
        "kernel": kernel,
        "versions": {name: version(name) for name in ("farkv", "torch", "transformers")},
    }
