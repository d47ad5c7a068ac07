"""What the native kernels are given, and the checks before C is entered: C reads addresses and cannot know.

In: views of one layer's index and records, as they are stored, and numbers. Out: nothing; what does not fit is refused
with CacheStateError. Positions alone are checked in C, which reads them anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Float32, Tensor
from farkv.errors import CacheStateError
from farkv.kernels.native_abi import count_row_bytes
from farkv.kernels.ways import MOST_RECORDS, Drawn, Paged, Varied, check_ways, refuse
from farkv.math.logits import Logits

PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CODED = ("int8", "int4")
WHOLE = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
MOST_SCALING, LEAST_SOFTCAP, MOST_SOFTCAP = 3e38, 1e-30, 1e30


class IndexView(NamedTuple):
    """The index of one layer, as it is stored.

    codes: int8 [B, Hkv, S, W], a view; heads and rows may have any stride, bytes of a row are contiguous. Byte j holds
    nibble j in its low half and nibble j + W in its high half.
    tables: what each of the 16 values of each of the 2 W nibbles stands for (math/tables.py).
    """

    codes: Tensor
    query: Float32[Tensor, "b Hkv D R"]
    tables: Float32[Tensor, "B Hkv Y w"]


class Rows(NamedTuple):
    """A view of the stored records of one layer.

    data: [B, Hkv, S, W], a row is [k | v]; float32, bfloat16 or float16, or uint8 where they are coded.
    form: "plain", or "int8" or "int4" as in store/far/quantize.py.
    """

    data: Tensor
    k_dim: int
    v_dim: int
    form: str = "plain"


def check_select(
    q: Tensor,
    index: IndexView,
    logits: Logits,
    *,
    cap: int,
    n: int,
    sinks: int,
    taken: Tensor | None,
    varied: Varied | None = None,
    drawn: Drawn | None = None,
    paged: Paged | None = None,
) -> None:
    """Raise CacheStateError unless `Native.select` may read these."""
    codes, side, tables = index
    if codes.ndim != 4 or codes.dtype is not torch.int8 or not codes.is_cpu or codes.stride(3) != 1:
        refuse("int8 codes [B, Hkv, S, W] in CPU memory, the bytes of a row side by side", codes)
    batch, heads, stored, width = codes.shape
    if q.ndim != 4 or q.dtype not in PLAIN or not q.is_cpu:
        refuse("queries [B, Hq, 1, D] in CPU memory", q)
    q_batch, hq, n_q, dim = q.shape
    if q_batch != batch or n_q != 1 or not 0 < heads <= hq or hq % heads:
        refuse(f"one query of every head, for {heads} KV heads of {batch} sequences", q)
    shape = side.shape
    columns = shape[3] if side.ndim == 4 else 0
    if shape[1:] != (heads, dim, columns) or shape[0] not in (1, batch) or side.dtype not in PLAIN or not side.is_cpu:
        refuse(f"a projection {(batch, heads, dim, 'R')} in CPU memory", side)
    wide = tables.shape[3] if tables.ndim == 4 else 0
    fits = wide > 0 and columns > 0 and width > 0 and columns % wide == 0 and 2 * width % (columns // wide) == 0
    if not fits or tables.shape[:3] != (batch, heads, 32 * width) or tables.dtype not in PLAIN or not tables.is_cpu:
        refuse(f"16 entries of each of {2 * width} nibbles, of equal parts of {columns} columns, in CPU memory", tables)
    n_taken = 0 if taken is None else _count_positions(taken, batch, heads)
    check_ways((varied, drawn, paged), (batch, heads), cap, n_taken)
    _expect_logits(logits)
    if not 0 <= cap <= cap + n_taken <= n <= stored <= MOST_RECORDS or sinks < 0:
        raise CacheStateError(
            f"native select: expected 0 <= cap, 0 <= sinks, cap + taken <= n <= stored records <= {MOST_RECORDS}, got "
            f"cap {cap}, sinks {sinks}, {n_taken} taken, n {n}, {stored} stored; choose fewer records"
        )


def check_attend(
    q: Tensor,
    rows: Rows,
    logits: Logits,
    *,
    positions: Tensor | None,
    counts: Tensor | None,
    n: int,
    tail: int,
    sinks: Tensor | None,
    odds: Tensor | None = None,
) -> str:
    """Raise CacheStateError unless `Native.attend` may read these; return the form of the records."""
    data, k_dim, v_dim, kind = rows
    form = PLAIN.get(data.dtype) if kind == "plain" else kind if kind in CODED and data.dtype is torch.uint8 else None
    if data.ndim != 4 or form is None or not data.is_cpu:
        refuse(f"records [B, Hkv, S, W] of a known form ({kind}) in CPU memory", data)
    batch, heads, stored, width = data.shape
    units = count_row_bytes(kind, k_dim, v_dim, 1)
    if k_dim <= 0 or v_dim <= 0 or units != width or data.stride(3) != 1:
        refuse(f"rows of k and v, {units} for {k_dim} and {v_dim} numbers, side by side", data)
    if q.ndim != 4 or q.dtype not in PLAIN or not q.is_cpu:
        refuse("queries [B, Hq, 1, Dk] in CPU memory", q)
    q_batch, hq, n_q, dim = q.shape
    if q_batch != batch or n_q != 1 or dim != k_dim or not 0 < heads <= hq or hq % heads:
        refuse(f"one query of every head and {k_dim} numbers, for {heads} KV heads of {batch} sequences", q)
    if sinks is not None and (sinks.shape != (hq,) or sinks.dtype not in PLAIN or not sinks.is_cpu):
        refuse("a sink of every query head", sinks)
    if positions is not None:
        _count_positions(positions, batch, heads)
    if counts is not None and (positions is None or counts.shape != (batch, heads) or counts.dtype is not torch.int64):
        refuse(f"int64 numbers of positions to read, {(batch, heads)}, beside positions", counts)
    if odds is not None and (positions is None or odds.shape != positions.shape or not odds.is_cpu):
        refuse("odds of every position, in CPU memory, beside positions", odds)
    _expect_logits(logits)
    if not 0 <= tail <= n <= stored:
        raise CacheStateError(
            f"native attend: expected 0 <= tail <= n <= stored records, got tail {tail}, n {n}, {stored} stored; "
            "append them first"
        )
    return form


def check_gather(data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> tuple[int, int]:
    """Raise CacheStateError unless `Native.gather` may copy; return the rows of a run of `out`, and its stride."""
    if data.ndim != 4 or not data.is_cpu or not data.is_contiguous():
        refuse("a contiguous pool [B, Hkv, S, W] in CPU memory", data)
    n, width = heads.numel(), data.shape[3]
    for at in (heads, positions):
        if at.shape != (n,) or at.dtype is not torch.int64 or not at.is_cpu or not at.is_contiguous():
            refuse(f"{n} times a contiguous int64 in CPU memory", at)
    shape, strides = out.shape, out.stride()
    n_runs, run, wide = shape if len(shape) == 3 else (1, *shape) if len(shape) == 2 else (0, 0, -1)
    stride = strides[0] if len(shape) == 3 else run * wide
    fits = n_runs * run == n and wide == width and strides[-2:] == (width, 1)
    # Runs that overlap would be written twice, by threads at once.
    if not fits or out.dtype is not data.dtype or not out.is_cpu or (stride < run * width and n_runs > 1):
        refuse(f"room for these rows, {n} of {width}, apart and each side by side", out)
    itemsize, a, b = data.element_size(), data.data_ptr(), out.data_ptr()
    if n and a < b + ((n_runs - 1) * stride + run * width) * itemsize and b < a + data.numel() * itemsize:
        refuse("room outside the pool", out)
    return run, stride


def check_reading(data: Tensor, positions: Tensor | None = None, row_bytes: int = 1) -> None:
    """Raise CacheStateError unless all bytes, or rows of `row_bytes` at these positions, can be read."""
    if not data.is_cpu or not data.is_contiguous():
        refuse("a contiguous tensor in CPU memory", data)
    if positions is None:
        return
    if positions.ndim != 1 or positions.dtype is not torch.int64 or not positions.is_cpu or positions.stride(0) != 1:
        refuse("contiguous int64 positions", positions)
    n_rows = data.numel() * data.element_size() // row_bytes if row_bytes > 0 else 0
    if len(positions) == 0 or int(positions.min()) < 0 or int(positions.max()) >= n_rows:
        raise CacheStateError(
            f"gather bandwidth: expected positions within {n_rows} rows of {row_bytes} bytes; name rows that exist"
        )


def _count_positions(positions: Tensor, batch: int, heads: int) -> int:
    """Return how many positions every KV head has."""
    shape = positions.shape
    if len(shape) != 3 or shape[0] != batch or shape[1] != heads:
        refuse(f"positions of every KV head, {(batch, heads)}", positions)
    if positions.dtype not in WHOLE or not positions.is_cpu:
        refuse("positions that are whole numbers in CPU memory", positions)
    return shape[2]


def _expect_logits(logits: Logits) -> None:
    """Raise CacheStateError unless float32 can hold scaling and softcap; NaN cannot be compared, and fails."""
    cap = logits.softcap
    if not -MOST_SCALING <= logits.scaling <= MOST_SCALING or (cap and not LEAST_SOFTCAP <= cap <= MOST_SOFTCAP):
        raise CacheStateError(
            f"native kernels: expected a finite scaling, and a softcap of {LEAST_SOFTCAP:g} to {MOST_SOFTCAP:g} or "
            f"none, got {logits.scaling} and {cap}; set FARKV_KERNEL=plain to compute with these"
        )


def check_tables(keys: Tensor, tables: Tensor, weights: Tensor | None) -> None:
    """Raise CacheStateError unless `Native.learn_tables` and `Native.encode_nibbles` may read these."""
    if keys.ndim != 4 or keys.dtype is not torch.float32 or not keys.is_cpu:
        refuse("projected keys, float32 [B, Hkv, N, R] in CPU memory", keys)
    batch, heads, n, columns = keys.shape
    wide, rows = (tables.shape[3], tables.shape[2]) if tables.ndim == 4 else (0, 0)
    fits = wide > 0 and rows > 0 and columns > 0 and columns % wide == 0
    if not fits or rows % 32 or rows // 16 % (columns // wide) or tables.shape[:2] != (batch, heads):
        refuse(f"tables of {(batch, heads)}, an even number of nibbles for equal parts of {columns} columns", tables)
    if tables.dtype is not torch.float32 or not tables.is_cpu or not tables.is_contiguous():
        refuse("contiguous float32 tables in CPU memory", tables)
    if weights is not None and (weights.shape != (batch, heads, n) or weights.dtype is not torch.float32 or n == 0):
        refuse(f"a weight of every key, {(batch, heads, n)}", weights)
