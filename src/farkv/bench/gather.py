"""`farkv bench gather`: this machine's bandwidth for sequential reads, and for sorted row reads with prefetch.

In: row sizes and densities. Out: a report. These bandwidths give the lower bound (floor) that decode is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType

from farkv.bench.fill import require_memory
from farkv.bench.machine import (
    BUFFER_BYTES,
    DENSITIES,
    ROW_BYTES,
    GatherRate,
    Machine,
    describe_machine,
    measure_gather,
    require_native,
)
from farkv.bench.report import draw_machine, make_table
from farkv.bench.stopped import Keep


@dataclass(frozen=True)
class GatherReport:
    """Gather bandwidths by row size and density, and the sequential bandwidth."""

    rates: list[GatherRate]
    machine: dict[str, Any]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; keys that do not apply to a bandwidth are null."""
        blank = {"context": None, "batch": None, "ms_per_layer": None, "floor_percent": None}
        rows: list[dict[str, Any]] = [
            {"method": "read", **blank, "read_fraction": 1.0, "gb_per_s": self.machine["read_gb_per_s"]}
        ]
        rows += [
            {
                "method": f"gather-{rate.row_bytes}", **blank, "read_fraction": rate.density,
                "row_bytes": rate.row_bytes, "gb_per_s": round(rate.bytes_per_s / 1e9, 3),
            }
            for rate in self.rates
        ]  # fmt: skip
        return {"rows": rows, "machine": self.machine, "settings": self.settings}


def measure_rows(
    tell: Callable[[int, int], None] = lambda done, total: None, *, buffer_bytes: int = BUFFER_BYTES
) -> GatherReport:
    """Measure every row size at every density.

    Raises:
        ConfigError: there is no native kernel.
        CapacityError: the buffer does not fit in memory.
        Stopped: by Ctrl-C; it has what was finished.
    """
    native = require_native("gather")
    require_memory(buffer_bytes, "the buffer")
    machine = Machine(native, DENSITIES[1], buffer_bytes=buffer_bytes)
    rates, total = list[GatherRate](), len(ROW_BYTES) * len(DENSITIES)
    tell(0, total)
    with Keep(rates) as keep:
        for row_bytes in ROW_BYTES:
            for density in DENSITIES:
                rates.append(measure_gather(native, machine.buffer, row_bytes, density))
                tell(len(rates), total)
        machine.measure_again()
    found = describe_machine(machine, native.name)
    return keep.give(GatherReport(rates, found, {"buffer_bytes": buffer_bytes}))


def draw_gather(report: GatherReport) -> RenderableType:
    """Return a table of GB/s by row size and density."""
    table = make_table("sorted, prefetched row reads: GB/s", tuple(f"{d:.0%} of rows" for d in DENSITIES), "rows")
    for row_bytes in ROW_BYTES:
        rates = [rate.bytes_per_s for rate in report.rates if rate.row_bytes == row_bytes]
        table.add_row(f"{row_bytes} bytes", *(f"{rate / 1e9:.2f}" for rate in rates))
    return Group(table, draw_machine(report.machine))
