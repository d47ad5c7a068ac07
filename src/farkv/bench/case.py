"""The parameters of one measurement, and the bytes a method moves per step. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from farkv.bench.shapes import ModelShape

# Total KV bytes of a fast and of a slow method's layers: more than the processor's caches hold.
FAST_BYTES = 1 << 30
SLOW_BYTES = 1 << 27


class Case(NamedTuple):
    """Shape, context, batch, fraction read, layers and device of one measurement."""

    shape: ModelShape
    context: int
    batch: int = 1
    fraction: float = 0.05
    # None: as many as it takes to fill FAST_BYTES or SLOW_BYTES.
    layers: int | None = None
    device: torch.device = torch.device("cpu")

    @property
    def layer_bytes(self) -> int:
        """Return the KV bytes of one layer in bfloat16."""
        return self.shape.layer_bytes(self.context, self.batch)

    @property
    def fast_layers(self) -> int:
        """Return the number of layers for a method that reads little."""
        return self.layers or self.count_layers(FAST_BYTES)

    @property
    def slow_layers(self) -> int:
        """Return the number of layers for a method that reads everything."""
        return self.layers or self.count_layers(SLOW_BYTES)

    def count_layers(self, n_bytes: int) -> int:
        """Return how many layers `n_bytes` fill: at least two, at most the shape's."""
        return max(2, min(self.shape.layers, -(-n_bytes // self.layer_bytes)))


class Traffic(NamedTuple):
    """Bytes that one layer and step reads: sequentially, and gathered in rows of `row_bytes`."""

    read_fraction: float
    scanned_bytes: float
    gathered_bytes: float = 0.0
    row_bytes: int = 0


class Bandwidth(NamedTuple):
    """This machine's bytes per second: sequential reads, and sorted row reads with prefetch."""

    read: float
    # As a function of the row size in bytes.
    gather: Callable[[int], float]


def find_floor(traffic: Traffic, bandwidth: Bandwidth) -> float:
    """Return the lower bound on a step's seconds: scanned / read bandwidth + gathered / gather bandwidth."""
    seconds = traffic.scanned_bytes / bandwidth.read
    return seconds + (traffic.gathered_bytes / bandwidth.gather(traffic.row_bytes) if traffic.gathered_bytes else 0.0)
