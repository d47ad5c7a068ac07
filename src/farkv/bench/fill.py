"""Random records, drawn fast enough that 128 K tokens take seconds, and a check that they fit in memory.

In: a shape, tokens. Out: K and V of any layer and token range, the same for every method.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from farkv._axes import Float, Tensor
from farkv.bench.shapes import ModelShape
from farkv.config import format_bytes
from farkv.errors import CapacityError

# Rows of the block that records are drawn from, and tokens per draw.
BLOCK_ROWS = 1 << 17
CHUNK_TOKENS = 4096
# Memory left for the system and other programs.
SPARE_BYTES = 512 << 20


class Noise:
    """Normal random numbers: record t of a head is row (t * stride + offset) of one block, with an offset per head.

    Random keys have no locality: the selected records are scattered, the worst case for reading them.

    Args:
        width: elements of a row.
    """

    def __init__(self, width: int, device: torch.device, *, seed: int = 0, rows: int = BLOCK_ROWS):
        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(rows, width, generator=generator).to(device, torch.bfloat16)
        # Odd, hence coprime to the power-of-two block length: a head's rows repeat only after the whole block.
        self.stride = 0x9E37_79B1 % rows | 1

    def draw(self, size: tuple[int, int, int], start: int, salt: int, dtype: torch.dtype) -> Float[Tensor, "B H T D"]:
        """Return rows of `size` = (B, H, T) from token `start`; the same arguments give the same rows.

        Cost: B * H * T * D elements read and written.
        """
        batch, heads, n = size
        device, rows = self.block.device, self.block.shape[0]
        tokens = torch.arange(start, start + n, device=device) * self.stride
        offsets = (torch.arange(batch * heads, device=device) + 1009 * salt) * 40_503
        where = (tokens[None] + offsets[:, None]) % rows
        return self.block.index_select(0, where.view(-1)).view(batch, heads, n, -1).to(dtype)


class KVSource:
    """Keys, values and queries of every layer of a shape, in `dtype` where nothing else is asked for."""

    def __init__(
        self, shape: ModelShape, batch: int, device: torch.device, *,
        rows: int = BLOCK_ROWS, dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        self.shape, self.batch, self.device, self.dtype = shape, batch, device, dtype
        self.noise = Noise(shape.head_dim, device, rows=rows)

    def draw_kv(
        self, layer: int, start: int, n: int, dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, "B Hkv T D"], Float[Tensor, "B Hkv T D"]]:
        """Return K and V of `n` tokens from `start`."""
        size, dtype = (self.batch, self.shape.kv_heads, n), dtype or self.dtype
        return self.noise.draw(size, start, 3 * layer, dtype), self.noise.draw(size, start, 3 * layer + 1, dtype)

    def draw_q(self, layer: int, start: int, n: int, dtype: torch.dtype | None = None) -> Float[Tensor, "B Hq T D"]:
        """Return queries of `n` tokens from `start`."""
        return self.noise.draw((self.batch, self.shape.heads, n), start, 3 * layer + 2, dtype or self.dtype)

    def chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (start, length) of each chunk of at most CHUNK_TOKENS."""
        for start in range(0, tokens, CHUNK_TOKENS):
            yield start, min(CHUNK_TOKENS, tokens - start)


def find_available_bytes() -> int:
    """Return the bytes of memory available without swapping."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(n_bytes: int, what: str) -> None:
    """Check that `n_bytes` fit in memory, before anything is allocated.

    Raises:
        CapacityError: they do not fit.
    """
    available = find_available_bytes() - SPARE_BYTES
    if n_bytes > available:
        raise CapacityError(
            f"bench: {what} needs {format_bytes(n_bytes)}, but only {format_bytes(max(0, available))} are available; "
            "use shorter --contexts, fewer --layers, a smaller --batch or fewer --methods"
        )
