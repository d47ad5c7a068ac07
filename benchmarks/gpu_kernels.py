"""Times of the GPU's kernels on one layer, beside what memory and the link can do, measured in the same run.

In: a shape, a context. Out: a row per kernel: microseconds, the bytes that it has to move, and the percentage of the
floor. Rows that crossed the link are counted on the device and compared with what was predicted on the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from farkv.bench.shapes import ModelShape
from farkv.kernels.gpu import Gpu
from farkv.kernels.held import Held
from farkv.kernels.native import IndexView, Rows
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec

COLUMNS, BITS = 32, 4


class Layer(NamedTuple):
    """One layer: what is near, and what is in pinned host memory."""

    shape: ModelShape
    tokens: int
    cap: int
    index: IndexView
    far: torch.Tensor
    near: torch.Tensor
    queries: torch.Tensor


def make_layer(shape: ModelShape, tokens: int, fraction: float, device: torch.device) -> Layer:
    """Make random records and codes of one layer, near and far."""
    width = 2 * shape.head_dim
    near = torch.randn(1, shape.kv_heads, tokens, width, device=device).to(torch.bfloat16)
    far = torch.empty(near.shape, dtype=near.dtype, pin_memory=device.type == "cuda")
    far.copy_(near)
    codes = torch.randint(-128, 128, (1, shape.kv_heads, tokens, COLUMNS * BITS // 8), device=device).to(torch.int8)
    projection = torch.randn(1, shape.kv_heads, shape.head_dim, COLUMNS, device=device)
    scale = torch.full((1, shape.kv_heads, 1, COLUMNS), 0.02, device=device)
    queries = torch.randn(1, shape.heads, 1, shape.head_dim, device=device).to(torch.bfloat16)
    return Layer(shape, tokens, int(fraction * tokens), IndexView(codes, BITS, projection, scale), far, near, queries)


class Timer:
    """Times a call on a device: the median of several, each with cold caches as far as its own data are concerned."""

    def __init__(self, device: torch.device, rounds: int = 20):
        self.is_gpu, self.rounds = device.type == "cuda", rounds if device.type == "cuda" else 1
        # Written between rounds: what a call reads does not wait for it in the second-level cache.
        self.flush = torch.empty(256 << 20 if self.is_gpu else 1, dtype=torch.uint8, device=device)

    def measure_us(self, call: Callable[[], Any]) -> float:
        """Return microseconds of one call, launches included."""
        call()
        return statistics.median(self._once(call) for _ in range(self.rounds))

    def _once(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if not self.is_gpu:
            started = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - started)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)


def capture(call: Callable[[], Any], *, is_gpu: bool) -> Callable[[], Any]:
    """Return a replay of the call as a CUDA graph: what its launches cost is then not measured."""
    if not is_gpu:
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_bandwidth(kernels: Gpu, layer: Layer) -> dict[str, float]:
    """Return bytes per second of near memory and of the link, read in sequence and in the rows of a choice."""
    flat = layer.near.reshape(-1, layer.near.shape[-1])
    row_bytes = flat.shape[-1] * 2
    n = max(1, layer.cap * layer.shape.kv_heads)
    rows = torch.randperm(len(flat), device=flat.device)[:n].sort().values
    link = kernels.read_bandwidth(layer.far)
    if layer.near.is_cuda:
        target, timer = torch.empty_like(layer.near), Timer(layer.near.device, 5)
        engine_us = timer.measure_us(lambda: target.copy_(layer.far, non_blocking=True))
        link = max(link, layer.far.numel() * 2 / (1e-6 * engine_us))
    return {
        "near": kernels.read_bandwidth(layer.near),
        "near_rows": kernels.gather_bandwidth(layer.near, rows, row_bytes),
        "link": link,
        "link_rows": kernels.gather_bandwidth(layer.far, rows, row_bytes),
    }


def hold_half(positions: torch.Tensor, layer: Layer) -> Held:
    """Return a hot set that holds every second of these positions."""
    kept = positions[..., ::2].contiguous()
    slots = torch.full(layer.near.shape[:3], -1, dtype=torch.int32, device=positions.device)
    places = torch.arange(kept.shape[-1], dtype=torch.int32, device=positions.device).expand_as(kept)
    slots.scatter_(-1, kept, places)
    return Pinned(layer.near[:, :, : kept.shape[-1]].contiguous(), slots)


def measure_kernels(kernels: Gpu, layer: Layer, speeds: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row per kernel."""
    device, row_bytes = layer.near.device, 2 * layer.near.shape[-1]
    timer, is_gpu = Timer(device), device.type == "cuda"
    logits, n = Logits(layer.shape.scaling), layer.tokens
    rows = Rows(layer.near, layer.shape.head_dim, layer.shape.head_dim)
    chosen = kernels.select(layer.queries, layer.index, logits, cap=layer.cap, n=n)
    out = torch.empty(*chosen.shape, layer.near.shape[-1], dtype=layer.near.dtype, device=device)
    crossed = torch.zeros(1, dtype=torch.int64, device=device)
    held, q = hold_half(chosen, layer), layer.queries
    codec = Codec("int8", rows.k_dim, rows.v_dim, torch.bfloat16)
    k, v = out.normal_()[..., : rows.k_dim], out[..., rows.k_dim :]
    coded = Rows(codec.encode(k, v), rows.k_dim, rows.v_dim, "int8")
    n_rows, index_bytes = chosen.numel(), layer.index.codes.numel()
    calls: list[tuple[str, Callable[[], Any], float, str]] = [
        ("select", lambda: kernels.select(q, layer.index, logits, cap=layer.cap, n=n), index_bytes, "near"),
        ("fetch from pinned", lambda: kernels.fetch(layer.far, chosen, out, crossed), n_rows * row_bytes, "link_rows"),
        ("fetch, half of it near", lambda: kernels.fetch(layer.far, chosen, out, crossed, held=held),
         (n_rows - held.rows[..., 0].numel()) * row_bytes, "link_rows"),
        ("attend to chosen", lambda: kernels.attend(q, rows, logits, positions=chosen, n=n),
         n_rows * row_bytes, "near_rows"),
        ("attend, int8 records", lambda: kernels.attend(q, coded, logits, positions=None, n=chosen.shape[-1]),
         coded.data.numel(), "near"),
        ("attend to all", lambda: kernels.attend(q, rows, logits, positions=None, n=n),
         layer.near.numel() * 2, "near"),
    ]  # fmt: skip
    found = []
    for name, call, n_bytes, floor in calls:
        us = timer.measure_us(capture(call, is_gpu=is_gpu))
        percent = 100 * n_bytes / speeds[floor] / (1e-6 * us)
        found.append({"kernel": name, "us": us, "bytes": int(n_bytes), "floor": floor, "floor_percent": percent})
    return found


def count_crossed(kernels: Gpu, layer: Layer) -> dict[str, int]:
    """Return the bytes that a fetch brings over the link: predicted on the host, and counted on the device."""
    chosen = kernels.select(layer.queries, layer.index, Logits(layer.shape.scaling), cap=layer.cap, n=layer.tokens)
    held = hold_half(chosen, layer)
    counts = torch.full(chosen.shape[:2], layer.cap * 3 // 4, dtype=torch.int32, device=chosen.device)
    out = torch.empty(*chosen.shape, layer.near.shape[-1], dtype=layer.near.dtype, device=chosen.device)
    crossed = torch.zeros(1, dtype=torch.int64, device=chosen.device)
    kernels.fetch(layer.far, chosen, out, crossed, counts=counts, held=held)
    missing = held.slots.gather(-1, chosen)[..., : layer.cap * 3 // 4] < 0
    return {"predicted": int(missing.sum()) * out.shape[-1] * 2, "counted": int(crossed)}
