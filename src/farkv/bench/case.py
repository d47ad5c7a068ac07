"""One measurement's setting, and what a method moves at every step. Pure arithmetic but for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from farkv.bench.shapes import ModelShape

# Layers of a fast method hold about this much together, of a slow one this: more than a processor's caches.
FAST_BYTES = 1 << 30
SLOW_BYTES = 1 << 27


class Case(NamedTuple):
    """A shape, a context, a batch, how much is read of it, and where."""

    shape: ModelShape
    context: int
    batch: int = 1
    fraction: float = 0.05
    # None: as many as FAST_BYTES or SLOW_BYTES need.
    layers: int | None = None
    device: torch.device = torch.device("cpu")

    @property
    def layer_bytes(self) -> int:
        """Return the KV bytes of one layer in bfloat16."""
        return self.shape.layer_bytes(self.context, self.batch)

    @property
    def fast_layers(self) -> int:
        """Return the layers of a method that reads little."""
        return self.layers or self.count_layers(FAST_BYTES)

    @property
    def slow_layers(self) -> int:
        """Return the layers of a method that reads everything."""
        return self.layers or self.count_layers(SLOW_BYTES)

    def count_layers(self, n_bytes: int) -> int:
        """Return how many layers hold `n_bytes`: at least two, at most the shape's."""
        return max(2, min(self.shape.layers, -(-n_bytes // self.layer_bytes)))


class Traffic(NamedTuple):
    """Bytes of one layer and step: read in sequence, and gathered in rows of `row_bytes`."""

    read_fraction: float
    scanned_bytes: float
    gathered_bytes: float = 0.0
    row_bytes: int = 0


class Bandwidth(NamedTuple):
    """Bytes per second of this machine: reading in sequence, and reading sorted rows with prefetch."""

    read: float
    # By row bytes.
    gather: Callable[[int], float]


def find_floor(traffic: Traffic, bandwidth: Bandwidth) -> float:
    """Return the seconds that a step's bytes take: scanned / read bandwidth + gathered / gather bandwidth."""
    seconds = traffic.scanned_bytes / bandwidth.read
    return seconds + (traffic.gathered_bytes / bandwidth.gather(traffic.row_bytes) if traffic.gathered_bytes else 0.0)
