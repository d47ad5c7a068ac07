"""Rows that the GPU brings near are the pool's, byte for byte, and what crossed the link is counted."""

from __future__ import annotations

import pytest
import torch

from farkv.errors import CacheStateError
from farkv.kernels import gpu
from farkv.kernels.native import load_native
from farkv.kernels.near_copies import NearCopies
from tests.kernels.gpu_interpreter import DEVICE, GPU, HAS_GPU, LARGER, MARKS

pytestmark = MARKS
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8)


def make_pool(width: int = 24, dtype: torch.dtype = torch.bfloat16, batch: int = 2) -> torch.Tensor:
    """Rows as the pool has them: in host memory, pinned where there is a GPU, with room behind them."""
    n = 50 * LARGER
    pool = torch.randint(-100 if dtype != torch.uint8 else 0, 100, (batch, 2, n + 9, width)).to(dtype)
    return (pool.pin_memory() if HAS_GPU else pool)[:, :, :n]


def pick(pool: torch.Tensor, n: int) -> torch.Tensor:
    return torch.rand(pool.shape[:3]).argsort(-1)[..., :n].sort(-1).values


@pytest.mark.parametrize("width", [1, 7, 24, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows_are_the_pools(dtype: torch.dtype, width: int) -> None:
    pool = make_pool(width, dtype)
    n = 19 * LARGER
    heads, positions = torch.randint(0, 4, (n,)), torch.randint(0, pool.shape[2], (n,))
    out = torch.empty(n, width, dtype=dtype, device=DEVICE)
    GPU.gather(pool, heads.to(DEVICE), positions.to(DEVICE), out)
    assert torch.equal(out.cpu(), pool.reshape(4, -1, width)[heads, positions])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_only_what_is_not_near_crosses(copied: bool, counted: bool) -> None:
    pool = make_pool()
    k = 20 * LARGER
    positions = pick(pool, k)
    counts = torch.randint(0, k + 1, (2, 2), dtype=torch.int32)
    counts[0, 1] = 0
    near, slots = None, torch.full(pool.shape[:3], -1, dtype=torch.int32)
    if copied:
        kept = pick(pool, 15 * LARGER)
        slots.scatter_(-1, kept, torch.arange(kept.shape[-1], dtype=torch.int32).expand_as(kept))
        # Another value than the pool's, to tell where a row came from.
        rows = torch.full((2, 2, kept.shape[-1], 24), 77, dtype=pool.dtype)
        near = NearCopies(rows.to(DEVICE), slots.to(DEVICE))
    out = torch.full((2, 2, k + 3, 24), -1, dtype=pool.dtype, device=DEVICE)
    crossed = torch.tensor([1000], device=DEVICE)
    GPU.fetch(pool, positions.to(DEVICE), out, crossed, counts=counts.to(DEVICE) if counted else None, copies=near)
    index = positions[..., None].expand(-1, -1, -1, 24)
    here = slots.gather(-1, positions) >= 0
    expected = torch.where(here[..., None], 77, pool.gather(2, index))
    brought = torch.arange(k) < (counts if counted else torch.full((2, 2), k))[..., None]
    expected = torch.where(brought[..., None], expected, -1)
    assert torch.equal(out[:, :, :k].cpu(), expected.to(pool.dtype))
    assert (out[:, :, k:] == -1).all()
    assert int(crossed) == 1000 + 48 * int((brought & ~here).sum())


def test_nothing_to_bring_touches_nothing() -> None:
    pool, none = make_pool(), torch.empty(2, 2, 0, dtype=torch.int64, device=DEVICE)
    out, crossed = torch.zeros(2, 2, 4, 24, dtype=pool.dtype, device=DEVICE), torch.zeros(1, dtype=torch.int64)
    GPU.fetch(pool, none, out, crossed.to(DEVICE))
    GPU.gather(pool, none.view(-1), none.view(-1), out.view(-1, 24)[:0])
    assert not out.any()


@pytest.mark.parametrize("native", [True, False])
def test_rows_from_host_to_host_memory_are_the_cpus(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan or a set of recently used records lacks is gathered in host memory first."""
    monkeypatch.setattr(gpu, "load_native", load_native if native else lambda: None)
    pool, heads, positions = torch.randn(2, 2, 9, 6), torch.tensor([0, 3, 1]), torch.tensor([8, 0, 4])
    out = torch.empty(3, 6)
    gpu.Gpu().gather(pool, heads, positions, out)
    assert torch.equal(out, pool.view(4, 9, 6)[heads, positions])


@pytest.mark.parametrize("wrong", ["strided", "sequences apart"])
def test_rows_that_a_kernel_cannot_address_are_refused(wrong: str) -> None:
    pool = make_pool(batch=4)
    data = pool[..., ::2] if wrong == "strided" else pool[::2]
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(CacheStateError, match="packed"):
        GPU.gather(data, at, at, torch.empty(1, data.shape[-1], dtype=pool.dtype, device=DEVICE))


@pytest.mark.parametrize("gathered", [False, True])
def test_a_measured_pass_reads_every_byte(gathered: bool) -> None:
    rows = GPU._gather.to_words(torch.randint(-9, 9, (37 * LARGER, 12), dtype=torch.int32, device=DEVICE))
    positions = torch.arange(0, 37 * LARGER, 2, device=DEVICE) if gathered else None
    n = len(rows) if positions is None else len(positions)
    out = torch.zeros(-(-n // 8), dtype=torch.int32, device=DEVICE)
    GPU._gather.run_sum(rows, positions, out, 8)
    read = rows if positions is None else rows[positions]
    assert int(out.sum()) == int((read & 0xFFFF).sum())


def test_bandwidths_are_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock on which every pass takes half a second.
    ticks = iter(range(100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks) / 2)
    data = torch.zeros(1, 2, 16, 8, device=DEVICE)
    assert GPU.read_bandwidth(data) == 2 * data.numel() * 4
    assert GPU.gather_bandwidth(data, torch.tensor([0, 3], device=DEVICE), 64) == 2 * 2 * 64
