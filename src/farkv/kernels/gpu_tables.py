"""What each value of each nibble of an index adds to a query's logits, on the GPU: the first step of a choice.

In: queries, an index's projection and tables. Out: 16 numbers per nibble and query, in base 2, in scratch memory.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import triton
import triton.language as tl

from farkv._axes import Tensor
from farkv.kernels.native import IndexView
from farkv.math.logits import Logits

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
@no_type_check
def _project(q, query, out, factor, q_b, q_h, q_d, a_b, a_h, a_d, a_r, HEADS: tl.constexpr, G: tl.constexpr,
             D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    head = tl.program_id(0)
    b, h = head // HEADS, head % HEADS
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    inside = (d < D)[:, None] & (r < R)[None, :]
    a = tl.load(query + b * a_b + h * a_h + d[:, None] * a_d + r[None, :] * a_r, mask=inside, other=0.0)
    for g in tl.static_range(G):
        row = tl.load(q + b * q_b + (h * G + g) * q_h + d * q_d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out + (head * G + g) * R + r, tl.sum(row[:, None] * a, 0) * factor, mask=r < R)


@triton.jit
@no_type_check
def _tabulate(projected, tables, added, t_b, t_h, t_y, t_w, HEADS: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
              WIDE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(0)
    y = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = y < ENTRIES
    table = tables + (head // HEADS).to(tl.int64) * t_b + (head % HEADS).to(tl.int64) * t_h + y * t_y
    column = (y // 16) % (R // WIDE) * WIDE
    for g in tl.static_range(G):
        x = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(WIDE):
            p = tl.load(projected + (head * G + g) * R + column + j, mask=inside, other=0.0)
            x += p * tl.load(table + j * t_w, mask=inside, other=0.0)
        tl.store(added + (head * G + g) * ENTRIES + y, x, mask=inside)


def fill_tables(q: Tensor, index: IndexView, logits: Logits, room: tuple[Tensor, Tensor]) -> None:
    """Launch the first two kernels: what every value of every nibble adds to the logits of each query."""
    batch, heads, entries, wide = index.tables.shape
    projected, added = room
    dim, columns = index.query.shape[2:]
    factor = logits.scaling / logits.softcap if logits.softcap else logits.scaling * LOG2E.value
    a_b, *a_rest = index.query.stride()
    strides = (*(q.stride(i) for i in (0, 1, 3)), a_b if index.query.shape[0] > 1 else 0, *a_rest)
    sizes = dict(HEADS=heads, G=q.shape[1] // heads, R=columns)
    padded = dict(D=dim, DP=triton.next_power_of_2(dim), RP=triton.next_power_of_2(columns))
    _project[(batch * heads,)](q, index.query, projected, factor, *strides, **sizes, **padded)
    grid = batch * heads, triton.cdiv(entries, 256)
    tabulate: Any = _tabulate[grid]
    tabulate(projected, index.tables, added, *index.tables.stride(), **sizes, WIDE=wide,
             ENTRIES=entries, BLOCK=256)  # fmt: skip
