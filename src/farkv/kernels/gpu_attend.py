"""Attention of one query per head on the GPU, over chosen records or all; coded records are decoded as they are read.

In: queries, near rows, positions. Out: attention output. Each KV head's rows are split into parts that different
programs read in parallel, for all query heads of the group; a second launch joins the parts (split-K). float32
accumulation, online softmax in base 2, no host sync: counts may stay on the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from farkv._axes import Tensor
from farkv.kernels.native import Rows
from farkv.math.logits import Logits

LOG2E = tl.constexpr(math.log2(math.e))
# Values per group of coded rows, as in store/far/quantize.py.
GROUP = tl.constexpr(32)


@triton.jit
@no_type_check
def _read_plain(data, rows, ok, row_s, AT: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    return tl.load(data + rows[:, None] * row_s + AT + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
@no_type_check
def _read_whole_groups(codes, group_params, rows, ok, DP: tl.constexpr, BITS: tl.constexpr):
    """Decode rows of whole groups: codes in memory order, steps and minima read once per group."""
    groups: tl.constexpr = DP // GROUP
    width: tl.constexpr = GROUP * BITS // 8
    g, i = tl.arange(0, groups), tl.arange(0, groups * width)
    param = group_params + rows[:, None] + g[None, :]
    step = tl.load(param, mask=ok[:, None], other=0.0).to(tl.float32)
    raw = tl.load(codes + i[None, :], mask=ok[:, None], other=0).to(tl.int32)
    raw = tl.reshape(raw, [rows.shape[0], groups, width])
    if BITS == 8:
        x = raw.to(tl.float32) * step[:, :, None]
    else:
        low = tl.load(param + groups, mask=ok[:, None], other=0.0).to(tl.float32)
        # A group's low half-bytes come first, then the high ones.
        code = tl.permute(tl.join(raw & 15, (raw >> 4) & 15), (0, 1, 3, 2))
        code = tl.reshape(code, [rows.shape[0], groups, GROUP])
        x = code.to(tl.float32) * step[:, :, None] + low[:, :, None]
    return tl.reshape(x, [rows.shape[0], DP])


@triton.jit
@no_type_check
def _read_any_groups(codes, group_params, rows, ok, DIM: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Decode rows whose last group is shorter: value by value."""
    d = tl.arange(0, DP)
    group, i = d // GROUP, d % GROUP
    inside = ok[:, None] & (d < DIM)[None, :]
    param = group_params + rows[:, None] + group[None, :]
    step = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    if BITS == 8:
        x = tl.load(codes + d[None, :], mask=inside, other=0).to(tl.float32) * step
    else:
        # In a shorter group, the high half-bytes start at a smaller index.
        half = (tl.minimum(DIM - group * GROUP, GROUP) + 1) // 2
        is_high = i >= half
        byte = group * (GROUP // 2) + tl.where(is_high, i - half, i)
        pair = tl.load(codes + byte[None, :], mask=inside, other=0).to(tl.int32)
        code = (pair >> tl.where(is_high, 4, 0)[None, :]) & 15
        low = tl.load(param + (DIM + GROUP - 1) // GROUP, mask=inside, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * step + low
    return x


@triton.jit
@no_type_check
def _read_coded(codes, group_params, rows, ok, row_s, AT: tl.constexpr, PARAMS: tl.constexpr, DIM: tl.constexpr,
                DP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Decode K or V of some rows. Offsets: `AT` in bytes, `PARAMS` in values of two bytes."""
    at = codes + rows[:, None] * row_s + AT
    # DP is a power of two: if at least GROUP, it is a multiple of it.
    if DIM == DP and DP >= GROUP:
        x = _read_whole_groups(at, group_params + PARAMS, rows * (row_s // 2), ok, DP, BITS)
    else:
        x = _read_any_groups(at, group_params + PARAMS, rows * (row_s // 2), ok, DIM, DP, BITS)
    if HALF:
        # Half a step above the largest float16 would be infinity.
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x


@triton.jit
@no_type_check
def _list_rows(j, ok, positions, head, taken, k, first_of_tail, GATHERED: tl.constexpr):
    """Return rows number j to be read: the chosen ones, then the tail."""
    if GATHERED:
        chosen = tl.load(positions + head.to(tl.int64) * k + j, mask=ok & (j < taken), other=0)
    else:
        chosen = j.to(tl.int64)
    return tl.where(j < taken, chosen, (first_of_tail + j - taken).to(tl.int64))


# The launcher that Triton generates has a variable `params`: no argument may have that name.
@triton.jit(do_not_specialize=["n", "k", "tail"])
@no_type_check
def _attend(q, data, group_params, positions, counts, sums, tops, weights, n, k, tail, factor, gain, q_b, q_h, r_b, r_h,
            row_s, HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
            DV: tl.constexpr, DVP: tl.constexpr, BITS: tl.constexpr, V_AT: tl.constexpr, K_PARAMS: tl.constexpr,
            V_PARAMS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr,
            GATHERED: tl.constexpr, COUNTED: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)
    if ON_DEVICE:
        n = tl.load(n).to(tl.int32)
    taken = k if GATHERED else n - tail
    if COUNTED:
        taken = tl.minimum(tl.load(counts + head).to(tl.int32), taken)
    total = taken + tail
    each = tl.cdiv(tl.cdiv(total, BLOCK), parts) * BLOCK
    g, dk, dv = tl.arange(0, GP), tl.arange(0, DKP), tl.arange(0, DVP)
    q_at = q + b * q_b + (h * G + g)[:, None] * q_h + dk[None, :]
    query = tl.load(q_at, mask=(g < G)[:, None] & (dk < DK)[None, :], other=0.0).to(KIND)
    start = b * r_b + h * r_h
    data += start
    group_params += start // 2
    top = tl.full([GP], -1e38, tl.float32)
    weight = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DVP], tl.float32)
    for first in range(part * each, tl.minimum((part + 1) * each, total), BLOCK):
        j = first + tl.arange(0, BLOCK)
        ok = j < total
        rows = _list_rows(j, ok, positions, head, taken, k, n - tail, GATHERED)
        if BITS == 16:
            keys = _read_plain(data, rows, ok, row_s, 0, DK, DKP)
            values = _read_plain(data, rows, ok, row_s, V_AT, DV, DVP)
        else:
            keys = _read_coded(data, group_params, rows, ok, row_s, 0, K_PARAMS, DK, DKP, BITS, HALF)
            values = _read_coded(data, group_params, rows, ok, row_s, V_AT, V_PARAMS, DV, DVP, BITS, HALF)
        x = tl.dot(query, tl.trans(keys.to(KIND)), input_precision="ieee") * factor
        if CAPPED:
            x = gain * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))
        x = tl.where(ok[None, :], x, -1e38)
        now = tl.maximum(top, tl.max(x, 1))
        p = tl.where(ok[None, :], tl.exp2(x - now[:, None]), 0.0)
        fade = tl.exp2(top - now)
        weight = weight * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(KIND), values.to(KIND), input_precision="ieee")
        top = now
    at = (head * parts + part) * G + g
    tl.store(tops + at, top, mask=g < G)
    tl.store(weights + at, weight, mask=g < G)
    tl.store(sums + at[:, None] * DV + dv[None, :], acc, mask=(g < G)[:, None] & (dv < DV)[None, :])


@triton.jit
@no_type_check
def _join(sums, tops, weights, sinks, out, parts, HEADS: tl.constexpr, G: tl.constexpr, DV: tl.constexpr,
          DVP: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    head, g = tl.program_id(0), tl.program_id(1)
    i, d = tl.arange(0, PARTS), tl.arange(0, DVP)
    at = (head * parts + i) * G + g
    top_of = tl.load(tops + at, mask=i < parts, other=-1e38)
    top = tl.max(top_of, 0)
    if SINKS:
        sink = tl.load(sinks + (head % HEADS) * G + g).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    fade = tl.where(i < parts, tl.exp2(top_of - top), 0.0)
    weight = tl.sum(fade * tl.load(weights + at, mask=i < parts, other=0.0), 0)
    if SINKS:
        weight += tl.exp2(sink - top)
    x = tl.load(sums + at[:, None] * DV + d[None, :], mask=(i < parts)[:, None] & (d < DV)[None, :], other=0.0)
    x = tl.sum(x * fade[:, None], 0) / weight
    tl.store(out + (head * G + g) * DV + d, x.to(out.dtype.element_ty), mask=d < DV)


class Selection(NamedTuple):
    """The rows to read; see `gpu.Gpu.attend`."""

    positions: Tensor | None
    counts: Tensor | None
    n: int | Tensor
    tail: int


class Parts(NamedTuple):
    """Partial results of every part, per query head: weighted sums of values, largest logits, sums of weights."""

    sums: Tensor
    tops: Tensor
    weights: Tensor


class Tuning(NamedTuple):
    """Rows that a program reads at a time, and parts (programs) per KV head."""

    block: int
    parts: int
    interpreted: bool


def size_parts(heads: int, group: int, v_dim: int, parts: int) -> dict[str, tuple[int, torch.dtype]]:
    """Return the elements and dtype of every scratch tensor."""
    n = heads * parts * group
    return {"sums": (n * v_dim, torch.float32), "tops": (n, torch.float32), "weights": (n, torch.float32)}


def _lay_out(rows: Rows) -> dict[str, int]:
    """Return the layout of a row: offsets of V and, in coded rows, of the group parameters."""
    if rows.form == "plain":
        return dict(BITS=16, V_AT=rows.k_dim, K_PARAMS=0, V_PARAMS=0)
    bits, kinds, group = (8, 1, GROUP.value) if rows.form == "int8" else (4, 2, GROUP.value)
    k_bytes, v_bytes = (-(-dim * bits // 8) for dim in (rows.k_dim, rows.v_dim))
    params = (k_bytes + v_bytes + 1) // 2
    return dict(BITS=bits, V_AT=k_bytes, K_PARAMS=params, V_PARAMS=params + kinds * -(-rows.k_dim // group))


def _pick_kind(q: Tensor, rows: Rows, *, interpreted: bool) -> Any:
    """Return the dtype of products' operands; sums are always float32."""
    kind = q.dtype if rows.form != "plain" or rows.data.dtype == q.dtype else torch.float32
    # The interpreter multiplies bfloat16 as if its bits were integers.
    kind = torch.float32 if interpreted and kind == torch.bfloat16 else kind
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[kind]


def run_attend(
    q: Tensor, rows: Rows, logits: Logits, selection: Selection, sinks: Tensor | None, scratch: Parts, tuning: Tuning
) -> Tensor:
    """Launch the two kernels. Cost: every row read once, and a few floats per part."""
    (batch, kv_heads), group, (_, parts, interpreted) = rows.data.shape[:2], q.shape[1] // rows.data.shape[1], tuning
    positions, counts, n, tail = selection
    coded = rows.form != "plain"
    data = rows.data.view(torch.int8) if coded else rows.data
    group_params = rows.data.view(torch.bfloat16) if coded else data
    factor = logits.scaling / logits.softcap if logits.softcap else logits.scaling * LOG2E.value
    gain = logits.softcap * LOG2E.value if logits.softcap else 1.0
    sizes: dict[str, Any] = dict(HEADS=kv_heads, G=group, DV=rows.v_dim, DVP=_pad(rows.v_dim))
    # Placeholders for missing tensors are never read.
    launch: Any = _attend[batch * kv_heads, parts]
    launch(
        q, data, group_params, data if positions is None else positions, data if counts is None else counts, *scratch,
        n, 0 if positions is None else positions.shape[-1], tail, factor, gain, q.stride(0), q.stride(1),
        *data.stride()[:3], **sizes, **_lay_out(rows), GP=_pad(group), DK=rows.k_dim, DKP=_pad(rows.k_dim),
        KIND=_pick_kind(q, rows, interpreted=interpreted), HALF=q.dtype == torch.float16, CAPPED=bool(logits.softcap),
        GATHERED=positions is not None, COUNTED=counts is not None, ON_DEVICE=isinstance(n, Tensor),
        BLOCK=tuning.block, num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty(batch, group * kv_heads, 1, rows.v_dim, dtype=torch.float32 if interpreted else q.dtype,
                      device=q.device)  # fmt: skip
    _join[batch * kv_heads, group](
        *scratch, q if sinks is None else sinks, out, parts, **sizes, PARTS=triton.next_power_of_2(parts),
        SINKS=sinks is not None,
    )  # fmt: skip
    # The interpreter rounds to bfloat16 wrongly where a carry reaches the exponent: torch rounds instead.
    return out.to(q.dtype)


def _pad(n: int) -> int:
    """Return the padded size of a matrix product's side: a power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())
