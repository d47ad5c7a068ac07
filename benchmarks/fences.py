"""Tensors that end, or begin, where memory that cannot be read does: one byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
NO_ACCESS = 0


class Fences:
    """Memory between pages that nobody may touch, mapped until the block ends; use no tensor of it afterwards."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []

    def __enter__(self) -> Fences:
        return self

    def __exit__(self, *error: object) -> None:
        for at, n_bytes in self.mapped:
            LIBC.munmap(at, n_bytes)
        self.mapped.clear()

    def map_bytes(self, n_bytes: int, at_end: bool) -> int:
        """Return the address of so many bytes, the last of which (or the first) has a fence beside it."""
        page = mmap.PAGESIZE
        inner = max(page, -(-n_bytes // page) * page)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = LIBC.mmap(None, inner + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.mapped.append((start, inner + 2 * page))
        for fence in (start, start + page + inner):
            if LIBC.mprotect(fence, page, NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        return start + page + (inner - n_bytes if at_end else 0)

    def enclose(self, x: Tensor, at_end: bool) -> Tensor:
        """Return a copy with the same strides, from its first to its last element between fences."""
        if x.numel() == 0:
            return x
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        n_bytes = extent * x.element_size()
        area = (ctypes.c_uint8 * n_bytes).from_address(self.map_bytes(n_bytes, at_end))
        flat = torch.frombuffer(area, dtype=x.dtype)
        # Byte by byte: what stands between the rows too, and NaN as it is.
        flat.view(torch.uint8).copy_(x.detach().as_strided((extent,), (1,)).contiguous().view(torch.uint8))
        return flat.as_strided(x.shape, x.stride())
