"""Memory for rows, in huge pages so that gathering from a large pool is faster; and the interfaces that move rows.

In: a shape. Out: an uninitialised tensor. Knows bytes only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Protocol, runtime_checkable

import torch

from farkv._axes import Tensor
from farkv.errors import CapacityError
from farkv.math.pages import Located

HUGE_BYTES = 2 << 20


@runtime_checkable
class Mover(Protocol):
    """Kernels that move rows faster than plain operations."""

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy out[j] = data[head heads[j] of all sequences, position positions[j]], [N, W]."""
        ...


@runtime_checkable
class Fetcher(Mover, Protocol):
    """GPU kernels that read pinned host memory directly."""

    def fetch(self, data: Tensor, positions: Tensor, out: Tensor, crossed: Tensor) -> None:
        """Copy the rows of `data` [B, Hkv, S, W] at `positions` [B, Hkv, K] into `out`; add the bytes to `crossed`."""
        ...


@runtime_checkable
class PageMover(Mover, Protocol):
    """Kernels that know pages: where rows are, and how a file's pages come to memory, verified."""

    def locate(self, table: Tensor, slot_of: Tensor, heads: Tensor, positions: Tensor, tokens: int) -> Located:
        """Return the pages that rows are on, in the rows' order; as `math.pages.locate`."""
        ...

    def read_pages(self, file: tuple[int, int, int], sums: list[int], ids: Tensor, at: Tensor, out: Tensor) -> int:
        """Read page ids[j] into place at[j] of `out`, verified; return a j that fails, or how many there are.

        Args:
            file: it is open; where its page 0 begins, and the bytes of a page.
            sums: CRC-32 of each.
        """
        ...


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pin: bool = False) -> Tensor:
    """Return an uninitialised tensor; for host memory, ask Linux to back it with huge pages.

    Reading a 512-byte record at random from a pool of gigabytes also costs a page table walk; with pages of 2 MiB the
    tables stay in the CPU's caches. Systems without huge pages ignore this.

    Raises:
        RuntimeError: the system cannot allocate it.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin)
    n_bytes = tensor.numel() * tensor.element_size()
    if device.type == "cpu" and not pin and n_bytes >= 2 * HUGE_BYTES and sys.platform == "linux":
        start = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
        size = (tensor.data_ptr() + n_bytes - start) // HUGE_BYTES * HUGE_BYTES
        # Advice only: errors are ignored.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def grow_mapping(memory: mmap.mmap | None, n_bytes: int) -> mmap.mmap:
    """Map `n_bytes` of memory, or make a mapping as long; untouched pages of it take none.

    Raises:
        CapacityError: the system refuses.
    """
    try:
        if memory is None:
            # Private: the system would keep shared memory after MADV_DONTNEED.
            return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The system moves the mapping if it must: there is never a second copy.
        memory.resize(n_bytes)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"host: the system refuses {n_bytes:,} bytes of memory ({error}); give a lower host limit"
        ) from error
    return memory


def count_memory() -> int:
    """Return the bytes of this machine's memory, in use or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def return_freed() -> None:
    """Give the system back what was freed and the allocator still holds; it changes no setting of the process.

    After passes over a prompt glibc holds tens of megabytes that are in nobody's use, in pieces between what is. Other
    allocators have no such call. Cost: some milliseconds.
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


_libc = ctypes.CDLL(None)
