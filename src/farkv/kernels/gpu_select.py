"""Choose records on the GPU: score the index, find the threshold of the cap by histogram, write positions in order.

In: queries, codes. Out: positions, ascending, as many as the cap. No value is copied to the host, no launch depends on
one, and scratch is sized for the layer's allocation, so that a step can be captured in a CUDA graph.

    1 project   p = q A
    1 tabulate  what each value of each nibble adds: p . table
    2 measure   max and sum of exp2 per block of tokens: one program per head and block, here and below
    3 weigh     join the blocks' sums; the rank of each token; histogram of the ranks' upper 11 bits
    4 exclude   remove taken tokens from the ranks and the histogram
    5 refine    histogram of the next 10 bits, in the bin where the cap is reached
    6 count     tokens better than, and equal to, the threshold, per block
    7 write     positions, at offsets from the counts of earlier blocks

A rank is the float bits of y = 2 + log2 G - log2 w, as an integer: y is positive, so smaller is better. Comparing 17
bits of the mantissa separates weights whose log2 differs by y / 2^17, however small the weights are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from farkv._axes import Int, Tensor
from farkv.kernels.gpu_tables import LOG2E, fill_tables
from farkv.kernels.native import IndexView
from farkv.math.logits import Logits

BINS = tl.constexpr(2048)
FINE = tl.constexpr(1024)
# With four, a block of 1024 tokens spills registers.
WARPS = 8
# The rank of what must not be chosen; no other rank falls into its bin, the last.
WORST = tl.constexpr((2047 << 16) | 0xFFFF)
LEAST = tl.constexpr((2046 << 16) | 0xFFFF)
ONE = tl.constexpr(0x3F800000)


@triton.jit
@no_type_check
def _tanh(x):
    # exp2 overflows to infinity and underflows to zero: both ends are exact.
    return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))


@triton.jit
@no_type_check
def _load_codes(codes, head, s, ok, c_b, c_h, c_s, HEADS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    w = tl.arange(0, WP)
    start = (head // HEADS).to(tl.int64) * c_b + (head % HEADS).to(tl.int64) * c_h
    return tl.load(codes + start + s[:, None] * c_s + w[None, :], mask=ok[:, None] & (w < W)[None, :], other=0)


@triton.jit
@no_type_check
def _score(raw, added, gain, W: tl.constexpr, WP: tl.constexpr, CAPPED: tl.constexpr):
    """Return the logits of one query, in base 2: the sum of what every nibble adds."""
    w = tl.arange(0, WP)
    inside = (w < W)[None, :]
    low = w[None, :] * 16 + (raw.to(tl.int32) & 15)
    high = (W + w)[None, :] * 16 + ((raw.to(tl.int32) >> 4) & 15)
    x = tl.sum(tl.load(added + low, mask=inside, other=0.0) + tl.load(added + high, mask=inside, other=0.0), 1)
    if CAPPED:
        x = gain * _tanh(x)
    return x


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _measure(codes, added, parts, histograms, n, gain, c_b, c_h, c_s, HEADS: tl.constexpr, G: tl.constexpr,
             W: tl.constexpr, WP: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    head, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if ON_DEVICE:
        n = tl.load(n).to(tl.int32)
    if block == 0:
        # Clear both histograms of this head for the next launches.
        tl.store(histograms + head * 2 * BINS + tl.arange(0, 2 * BINS), tl.zeros([2 * BINS], tl.int32))
    s = block * BLOCK + tl.arange(0, BLOCK)
    raw = _load_codes(codes, head, s, s < n, c_b, c_h, c_s, HEADS, W, WP)
    for g in tl.static_range(G):
        x = _score(raw, added + (head * G + g) * (W * 32), gain, W, WP, CAPPED)
        x = tl.where(s < n, x, -1e38)
        top = tl.max(x, 0)
        tl.store(parts + (head * G + g) * 2 * blocks + block, top)
        tl.store(parts + ((head * G + g) * 2 + 1) * blocks + block, tl.sum(tl.where(s < n, tl.exp2(x - top), 0.0), 0))


@triton.jit
@no_type_check
def _join_parts(parts, blocks, BLOCKS: tl.constexpr):
    """Return log2 of one query's sum over all tokens."""
    i = tl.arange(0, BLOCKS)
    tops = tl.load(parts + i, mask=i < blocks, other=-1e38)
    sums = tl.load(parts + blocks + i, mask=i < blocks, other=0.0)
    top = tl.max(tops, 0)
    return top + tl.log2(tl.sum(sums * tl.exp2(tops - top), 0))


@triton.jit
@no_type_check
def _add_histogram(histogram, bins, last: tl.constexpr):
    counts = tl.histogram(bins, BINS)
    i = tl.arange(0, BINS)
    # Only the few bins that a block hits cost an atomic operation.
    tl.atomic_add(histogram + i, counts, mask=(counts > 0) & (i < last), sem="relaxed")


@triton.jit(do_not_specialize=["n", "sinks"])
@no_type_check
def _weigh(codes, added, parts, ranks, histograms, n, sinks, gain, base, c_b, c_h, c_s, rank_h,
           HEADS: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
           CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if ON_DEVICE:
        n = tl.load(n).to(tl.int32)
    s = block * BLOCK + tl.arange(0, BLOCK)
    raw = _load_codes(codes, head, s, s < n, c_b, c_h, c_s, HEADS, W, WP)
    joined = tl.full([BLOCK], -1e38, tl.float32)
    for g in tl.static_range(G):
        x = _score(raw, added + (head * G + g) * (W * 32), gain, W, WP, CAPPED)
        x -= _join_parts(parts + (head * G + g) * 2 * blocks, blocks, BLOCKS)
        top = tl.maximum(joined, x)
        joined = top + tl.log2(tl.exp2(joined - top) + tl.exp2(x - top))
    y = tl.maximum(base - joined, 1.0)
    rank = tl.minimum(y.to(tl.int32, bitcast=True) - ONE, LEAST)
    rank = tl.where(s < n, tl.where(s < sinks, 0, rank), WORST)
    tl.store(ranks + head.to(tl.int64) * rank_h + s, rank)
    _add_histogram(histograms + head * 2 * BINS, rank >> 16, 2047)


@triton.jit(do_not_specialize=["n_taken", "n"])
@no_type_check
def _exclude(taken, ranks, histograms, n_taken, n, rank_h, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    if ON_DEVICE:
        n = tl.load(n).to(tl.int32)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(taken + head.to(tl.int64) * n_taken + j, mask=j < n_taken, other=-1)
    inside = (at >= 0) & (at < n)
    # An exchange, so that a position that is given twice is removed from the histogram once.
    worst = tl.full([BLOCK], WORST, tl.int32)
    old = tl.atomic_xchg(ranks + head.to(tl.int64) * rank_h + at, worst, mask=inside, sem="relaxed")
    inside = inside & (old != WORST)
    old = tl.where(inside, old, 0)
    place = histograms + head * 2 * BINS + (old >> 16)
    tl.atomic_add(place, tl.full([BLOCK], -1, tl.int32), mask=inside, sem="relaxed")


@triton.jit
@no_type_check
def _find(histogram, wanted):
    """Return the bin in which the running count reaches `wanted`, and the count before that bin."""
    counts = tl.load(histogram + tl.arange(0, BINS))
    short = tl.cumsum(counts, 0) < wanted
    return tl.sum(short.to(tl.int32), 0), tl.sum(tl.where(short, counts, 0), 0)


@triton.jit(do_not_specialize=["cap"])
@no_type_check
def _refine(ranks, histograms, cap, rank_h, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    histogram = histograms + head * 2 * BINS
    coarse, _ = _find(histogram, cap)
    rank = tl.load(ranks + head.to(tl.int64) * rank_h + s)
    fine = tl.where((rank >> 16) == coarse, (rank >> 6) & (FINE - 1), BINS - 1)
    _add_histogram(histogram + BINS, fine, FINE)


@triton.jit(do_not_specialize=["cap"])
@no_type_check
def _count(ranks, histograms, counts, cap, rank_h, BLOCK: tl.constexpr):
    head, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    histogram = histograms + head * 2 * BINS
    coarse, before = _find(histogram, cap)
    fine, _ = _find(histogram + BINS, cap - before)
    threshold = coarse * FINE + fine
    s = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks + head.to(tl.int64) * rank_h + s) >> 6
    at = counts + head * (2 * blocks + 1)
    tl.store(at + block, tl.sum((rank < threshold).to(tl.int32), 0))
    tl.store(at + blocks + block, tl.sum((rank == threshold).to(tl.int32), 0))
    tl.store(at + 2 * blocks, threshold)


@triton.jit(do_not_specialize=["cap"])
@no_type_check
def _write(ranks, counts, out, cap, rank_h, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    head, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = counts + head * (2 * blocks + 1)
    threshold = tl.load(at + 2 * blocks)
    i = tl.arange(0, BLOCKS)
    better = tl.load(at + i, mask=i < blocks, other=0)
    equal = tl.load(at + blocks + i, mask=i < blocks, other=0)
    # The rest of the cap goes to tokens equal to the threshold, lowest positions first.
    ties = cap - tl.sum(better, 0)
    better_before = tl.sum(tl.where(i < block, better, 0), 0)
    equal_before = tl.sum(tl.where(i < block, equal, 0), 0)
    s = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks + head.to(tl.int64) * rank_h + s) >> 6
    tied = (rank == threshold).to(tl.int32)
    kept = (rank < threshold) | ((tied == 1) & (equal_before + tl.cumsum(tied, 0) <= ties))
    place = better_before + tl.minimum(equal_before, ties) + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out + head.to(tl.int64) * cap + place, s.to(tl.int64), mask=kept)


class Request(NamedTuple):
    """The arguments of `gpu.Gpu.select`."""

    cap: int
    n: int | Tensor
    sinks: int
    taken: Tensor | None


class Scratch(NamedTuple):
    """Memory that the launches share; its size stays the same for all steps of a layer."""

    projected: Tensor
    added: Tensor
    parts: Tensor
    ranks: Tensor
    histograms: Tensor
    counts: Tensor


def size_scratch(
    heads: int, group: int, index: IndexView, blocks: int, block: int
) -> dict[str, tuple[int, torch.dtype]]:
    """Return the number of elements and the dtype of every scratch tensor."""
    return {
        "projected": (heads * group * index.query.shape[3], torch.float32),
        "added": (heads * group * index.tables.shape[2], torch.float32),
        "parts": (heads * group * 2 * blocks, torch.float32),
        "ranks": (heads * blocks * block, torch.int32),
        "histograms": (heads * 2 * BINS.value, torch.int32),
        "counts": (heads * (2 * blocks + 1), torch.int32),
    }


def run_select(
    q: Tensor, index: IndexView, logits: Logits, request: Request, scratch: Scratch, block: int
) -> Int[Tensor, "B Hkv cap"]:
    """Launch the eight kernels, seven where nothing is taken. Cost: as `gpu.Gpu.select`."""
    (batch, kv_heads, rows, width), (cap, n, sinks, taken) = index.codes.shape, request
    heads, group, on_device = batch * kv_heads, q.shape[1] // kv_heads, isinstance(n, Tensor)
    blocks = triton.cdiv(rows if isinstance(n, Tensor) else n, block)
    padded, base = triton.next_power_of_2(blocks), 2.0 + math.log2(group)
    grid, rank_h = (heads, blocks), scratch.ranks.numel() // heads
    size: dict[str, Any] = {"BLOCK": block, "num_warps": WARPS}
    fill_tables(q, index, logits, (scratch.projected, scratch.added))
    gain = logits.softcap * LOG2E.value if logits.softcap else 1.0
    sizes: dict[str, Any] = dict(HEADS=kv_heads, G=group, W=width, WP=triton.next_power_of_2(width),
                 CAPPED=bool(logits.softcap), ON_DEVICE=on_device)  # fmt: skip
    strides, (_, added, parts, ranks, histograms, counts) = index.codes.stride()[:3], scratch
    _measure[grid](index.codes, added, parts, histograms, n, gain, *strides, **sizes, **size)
    launch: Any = _weigh[grid]
    launch(index.codes, added, parts, ranks, histograms, n, sinks, gain, base, *strides, rank_h,
                 **sizes, **size, BLOCKS=padded)  # fmt: skip
    if taken is not None and taken.shape[-1]:
        given = taken.shape[-1]
        _exclude[heads, triton.cdiv(given, 256)](taken, ranks, histograms, given, n, rank_h, on_device, BLOCK=256)
    out = torch.empty(batch, kv_heads, cap, dtype=torch.int64, device=q.device)
    _refine[grid](ranks, histograms, cap, rank_h, **size)
    _count[grid](ranks, histograms, counts, cap, rank_h, **size)
    _write[grid](ranks, counts, out, cap, rank_h, BLOCKS=padded, BLOCK=block)
    return out
