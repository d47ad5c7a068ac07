"""Times of the GPU's kernels on one layer, beside what memory and the link can do, measured in the same run.

In: a shape, a context. Out: a row per kernel: microseconds, the bytes that it has to move, and the percentage of the
floor. Rows that crossed the link are counted on the device and compared with what was predicted on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from runs import time_call

from farkv.bench.shapes import ModelShape
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import IndexView, Rows
from farkv.kernels.near_copies import NearCopies
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec

CODE_BYTES, COLUMNS, WIDTH = 16, 64, 8


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
    codes = torch.randint(-128, 128, (1, shape.kv_heads, tokens, CODE_BYTES), device=device).to(torch.int8)
    projection = torch.randn(1, shape.kv_heads, shape.head_dim, COLUMNS, device=device)
    tables = torch.randn(1, shape.kv_heads, 32 * CODE_BYTES, WIDTH, device=device)
    queries = torch.randn(1, shape.heads, 1, shape.head_dim, device=device).to(torch.bfloat16)
    return Layer(shape, tokens, int(fraction * tokens), IndexView(codes, projection, tables), far, near, queries)


def measure_us(call: Callable[[], Any], device: torch.device, rounds: int = 20) -> float:
    """Return the median microseconds of a call, launches included, each with cold caches as far as it can be had."""
    call()
    if device.type != "cuda":
        return 1e6 * time_call(call)[0]
    # Written between rounds: what a call reads does not wait for it in the second-level cache.
    flush, found = torch.empty(256 << 20, dtype=torch.uint8, device=device), []
    for _ in range(rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        found.append(1e3 * start.elapsed_time(stop))
    return statistics.median(found)


def capture(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a replay of the call as a CUDA graph: what its launches cost is then not measured."""
    if device.type != "cuda":
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
        target = torch.empty_like(layer.near)
        engine_us = measure_us(lambda: target.copy_(layer.far, non_blocking=True), layer.near.device, 5)
        link = max(link, layer.far.numel() * 2 / (1e-6 * engine_us))
    return {
        "near": kernels.read_bandwidth(layer.near),
        "near_rows": kernels.gather_bandwidth(layer.near, rows, row_bytes),
        "link": link,
        "link_rows": kernels.gather_bandwidth(layer.far, rows, row_bytes),
    }


def copy_half(positions: torch.Tensor, layer: Layer) -> NearCopies:
    """Return near copies of every second of these positions."""
    kept = positions[..., ::2].contiguous()
    slots = torch.full(layer.near.shape[:3], -1, dtype=torch.int32, device=positions.device)
    places = torch.arange(kept.shape[-1], dtype=torch.int32, device=positions.device).expand_as(kept)
    slots.scatter_(-1, kept, places)
    return NearCopies(layer.near[:, :, : kept.shape[-1]].contiguous(), slots)


def measure_kernels(kernels: Gpu, layer: Layer) -> dict[str, Any]:
    """Return the bandwidths, a row per kernel, and the bytes that a fetch brings over the link.

    Those are predicted on the host, and counted on the device.
    """
    device, width, n, q, index = layer.near.device, layer.near.shape[-1], layer.tokens, layer.queries, layer.index
    logits, speeds = Logits(layer.shape.scaling), measure_bandwidth(kernels, layer)
    rows = Rows(layer.near, layer.shape.head_dim, layer.shape.head_dim)
    chosen = kernels.select(q, index, logits, cap=layer.cap, n=n)
    out = torch.empty(*chosen.shape, width, dtype=layer.near.dtype, device=device)
    crossed, copies = torch.zeros(1, dtype=torch.int64, device=device), copy_half(chosen, layer)
    # Of each head three quarters of the choice are asked for.
    counts = torch.full(chosen.shape[:2], layer.cap * 3 // 4, dtype=torch.int32, device=device)
    kernels.fetch(layer.far, chosen, out, crossed, counts=counts, copies=copies)
    missing = int((copies.slots.gather(-1, chosen)[..., : layer.cap * 3 // 4] < 0).sum())
    link = {"predicted": missing * width * 2, "counted": int(crossed)}
    codec = Codec("int8", rows.k_dim, rows.v_dim, torch.bfloat16)
    k, v = out.normal_()[..., : rows.k_dim], out[..., rows.k_dim :]
    coded = Rows(codec.encode(k, v), rows.k_dim, rows.v_dim, "int8")
    n_bytes, n_near = chosen.numel() * width * 2, copies.rows.numel() * 2
    calls: dict[str, tuple[Callable[[], Any], float, str]] = {
        "select": (lambda: kernels.select(q, index, logits, cap=layer.cap, n=n), index.codes.numel(), "near"),
        "fetch from pinned": (lambda: kernels.fetch(layer.far, chosen, out, crossed), n_bytes, "link_rows"),
        "fetch, half of it near": (lambda: kernels.fetch(layer.far, chosen, out, crossed, copies=copies),
                                   n_bytes - n_near, "link_rows"),
        "attend to chosen": (lambda: kernels.attend(q, rows, logits, positions=chosen, n=n), n_bytes, "near_rows"),
        "attend, int8 records": (lambda: kernels.attend(q, coded, logits, positions=None, n=chosen.shape[-1]),
                                 coded.data.numel(), "near"),
        "attend to all": (lambda: kernels.attend(q, rows, logits, positions=None, n=n), layer.near.numel() * 2, "near"),
    }  # fmt: skip
    found = []
    for name, (call, moved, floor) in calls.items():
        us = measure_us(capture(call, device), device)
        percent = 100 * moved / speeds[floor] / (1e-6 * us)
        found.append({"kernel": name, "us": us, "bytes": int(moved), "floor": floor, "floor_percent": percent})
    return {"bandwidth": speeds, "kernels": found, "crossed": link}
