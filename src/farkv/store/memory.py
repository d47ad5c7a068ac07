"""Memory for rows: asked for in huge pages, which chosen rows of a large pool are found in faster; and what moves them.

In: a shape. Out: an uninitialised tensor. Knows bytes only.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Protocol, runtime_checkable

import torch

from farkv._axes import Tensor

HUGE_BYTES = 2 << 20


@runtime_checkable
class Mover(Protocol):
    """What a machine's kernels offer to a store."""

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy out[j] = data[head heads[j] of all sequences, position positions[j]], [N, W]."""
        ...


@runtime_checkable
class Fetcher(Mover, Protocol):
    """What a GPU's kernels offer besides: they read pinned host memory themselves."""

    def fetch(self, data: Tensor, positions: Tensor, out: Tensor, crossed: Tensor) -> None:
        """Bring rows [B, Hkv, S, W] at positions [B, Hkv, K] into `out`; the bytes are added to `crossed`."""
        ...


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pin: bool = False) -> Tensor:
    """Return an uninitialised tensor; in host memory the kernel is asked to back it with huge pages.

    A record of 512 bytes at a random place of a pool of gigabytes costs a walk through the page tables besides its
    bytes; with pages of 2 MiB these tables stay in the processor's caches. Where the system has none, nothing changes.

    Raises:
        RuntimeError: the system has no such memory.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin)
    n_bytes = tensor.numel() * tensor.element_size()
    if device.type == "cpu" and not pin and n_bytes >= 2 * HUGE_BYTES and sys.platform == "linux":
        start = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
        size = (tensor.data_ptr() + n_bytes - start) // HUGE_BYTES * HUGE_BYTES
        # Advice: an answer of "no" is as good as none.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


_libc = ctypes.CDLL(None)
