"""Gather rows on the GPU: from pinned host memory over the link, or from near copies.

In: rows in pinned host memory (which a kernel reads over the link in place) or near, positions. Out: rows in a near
buffer, and the bytes that crossed the link, counted on the device. Rows are moved as 4-byte words where these divide
them, 16 bytes per thread; rows beyond a head's count are neither read nor written.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from farkv._axes import Tensor
from farkv.kernels.near_copies import NearCopies


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _gather(data, heads, positions, out, n, head_s, row_s, W: tl.constexpr, WP: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, WP)
    inside = (j < n)[:, None] & (w < W)[None, :]
    head = tl.load(heads + j, mask=j < n, other=0).to(tl.int64)
    position = tl.load(positions + j, mask=j < n, other=0).to(tl.int64)
    x = tl.load(data + (head * head_s + position * row_s)[:, None] + w[None, :], mask=inside, other=0)
    tl.store(out + j.to(tl.int64)[:, None] * W + w[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _fetch(data, near, slots, positions, counts, out, crossed, k, data_h, near_h, slots_h, out_h, row_bytes,
           W: tl.constexpr, WP: tl.constexpr, COPIED: tl.constexpr, COUNTED: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = k
    if COUNTED:
        n = tl.minimum(tl.load(counts + head).to(tl.int32), k)
    first = tl.program_id(1) * BLOCK
    if first < n:
        j = first + tl.arange(0, BLOCK)
        w = tl.arange(0, WP)
        ok = j < n
        column = (w < W)[None, :]
        position = tl.load(positions + head * k + j, mask=ok, other=0)
        away = ok
        if COPIED:
            slot = tl.load(slots + head * slots_h + position, mask=ok, other=-1).to(tl.int64)
            away = ok & (slot < 0)
        x = tl.load(data + head * data_h + position[:, None] * W + w[None, :], mask=away[:, None] & column, other=0)
        if COPIED:
            here = (ok & (slot >= 0))[:, None]
            y = tl.load(near + head * near_h + slot[:, None] * W + w[None, :], mask=here & column, other=0)
            x = tl.where(here, y, x)
        tl.store(out + head * out_h + j[:, None] * W + w[None, :], x, mask=ok[:, None] & column)
        tl.atomic_add(crossed, tl.sum(away.to(tl.int64), 0) * row_bytes, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _sum_rows(data, positions, out, n, W: tl.constexpr, WP: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, WP)
    row = tl.load(positions + j, mask=j < n, other=0) if GATHERED else j.to(tl.int64)
    x = tl.load(data + row[:, None] * W + w[None, :], mask=(j < n)[:, None] & (w < W)[None, :], other=0)
    # One number per program, so that the reads are not optimised away.
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(x.to(tl.int32) & 0xFFFF, 1), 0))


def to_words(rows: Tensor) -> Tensor:
    """Return the same bytes as the widest words, of at most four bytes, that divide a row, its strides and address."""
    bytes_ = rows.view(torch.uint8)
    for word in (torch.int32, torch.int16):
        places = [*bytes_.stride()[:-1], bytes_.shape[-1], rows.data_ptr()]
        if all(place % word.itemsize == 0 for place in places):
            return rows.view(word)
    return bytes_


def _view_words(*rows: Tensor) -> list[Tensor]:
    """Return several tensors of rows as the widest words that fit all of them."""
    words = [to_words(r) for r in rows]
    least = min(words, key=lambda w: w.element_size()).dtype
    return [r.view(least) for r in rows]


def run_gather(data: Tensor, heads: Tensor, positions: Tensor, out: Tensor, block: int) -> None:
    """Launch the kernel. Cost: every row read and written once."""
    source, target = _view_words(data, out)
    width, n = source.shape[-1], len(positions)
    _gather[(triton.cdiv(n, block),)](
        source, heads, positions, target, n, source.stride(1), source.stride(2), W=width,
        WP=triton.next_power_of_2(width), BLOCK=block,
    )  # fmt: skip


class FetchRequest(NamedTuple):
    """One fetch; see `gpu.Gpu.fetch`."""

    positions: Tensor
    counts: Tensor | None
    copies: NearCopies | None
    out: Tensor
    crossed: Tensor


def run_fetch(data: Tensor, request: FetchRequest, block: int) -> None:
    """Launch the kernel. Cost: rows without a near copy cross the link once; every row is written near once."""
    positions, counts, copies, out, crossed = request
    source, near, target = _view_words(data, out if copies is None else copies.rows, out)
    width, (batch, heads, k) = source.shape[-1], positions.shape
    sizes: dict[str, Any] = dict(W=width, WP=triton.next_power_of_2(width), COPIED=copies is not None)
    # Placeholders for missing tensors are never read.
    _fetch[batch * heads, triton.cdiv(k, block)](
        source, near, crossed if copies is None else copies.slots, positions, crossed if counts is None else counts,
        target, crossed, k, source.stride(1), near.stride(1), 0 if copies is None else copies.slots.stride(1),
        target.stride(1), width * source.element_size(), **sizes, COUNTED=counts is not None, BLOCK=block,
    )  # fmt: skip


def run_sum(rows: Tensor, positions: Tensor | None, out: Tensor, block: int) -> None:
    """Read rows [N, W], those at `positions` or all, and write one number per program; for measuring bandwidth."""
    n = len(rows) if positions is None else len(positions)
    width = rows.shape[-1]
    _sum_rows[(triton.cdiv(n, block),)](
        rows, out if positions is None else positions, out, n, W=width, WP=triton.next_power_of_2(width),
        GATHERED=positions is not None, BLOCK=block,
    )  # fmt: skip
