"""Where the records of a cache are stored, relative to the memory that attention computes from.

In: limits, the device, what the method needs. Out: one of five placements, and its properties.
"""

from __future__ import annotations

from enum import Enum, auto

import torch

from farkv.store.records import StoreLimits


class Placement(Enum):
    """Where records are stored."""

    # In ordinary memory, which is also near memory: attention reads them in place.
    IN_PLACE = auto()
    # In near memory, under the near limit: for a method that keeps only what it reads.
    NEAR = auto()
    # In ordinary memory, quantised: decoded into buffers before attention.
    CODED = auto()
    # In host memory; near memory is a tier of its own, and what is read crosses a link.
    HOST = auto()
    # On disk, with copies of pages in host memory.
    DISK = auto()

    @property
    def is_far(self) -> bool:
        """Return whether records are copied before attention reads them."""
        return self not in (Placement.IN_PLACE, Placement.NEAR)

    @property
    def travels(self) -> bool:
        """Return whether copies are slow enough that prefetching hides time."""
        return self in (Placement.HOST, Placement.DISK)


def place_records(limits: StoreLimits, device: torch.device, *, lives_near: bool) -> Placement:
    """Return where records are stored under these limits.

    Args:
        lives_near: the method reads all that it keeps, so records are stored in near memory.
    """
    if lives_near:
        return Placement.NEAR if counts_near(limits, device) else Placement.IN_PLACE
    if limits.disk is not None or limits.saved is not None:
        return Placement.DISK
    if counts_near(limits, device):
        return Placement.HOST
    return Placement.IN_PLACE if limits.quant is None else Placement.CODED


def counts_near(limits: StoreLimits, device: torch.device) -> bool:
    """Return whether near memory is a tier of its own: a GPU's, or one with a limit."""
    return limits.near is not None or device.type == "cuda"
