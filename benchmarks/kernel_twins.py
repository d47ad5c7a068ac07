"""What the native kernels' answers must be: float64 twins, and how close float32 can come to them.

In: an answer and the operands. Out: None where it is right, else what is wrong with it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farkv.math.logits import Logits
from farkv.math.tables import decode_nibbles

# Float32's sums and products of such numbers may overflow: what is right then is not defined.
OVERFLOW, UNKNOWN = 1e37, 1e300
# The kernel's promise: weights that differ by less may change places, and so may weights far below the largest.
TOLERANCE, FAINT = 2.0**-7, 2.0**-120
# Logits that are off by more do not say what the output is: those of thousands.
EXACT = 1e-3


def check_attention(out: Tensor, q: Tensor, kv: tuple[Tensor, ...], logits: Logits, sinks: Tensor | None) -> str | None:
    """Compare attention over all of k and v with float64, as far as float32 can tell; see `compare`."""
    k, v = kv
    batch, heads, n, v_dim = v.shape
    grouped = q.double().reshape(batch, heads, -1, q.shape[-1])
    # The query is scaled, in float32, before it meets the keys.
    scaled = (q.float() * torch.tensor(logits.scaling, dtype=torch.float32)).double().reshape(grouped.shape)
    got = out.double().reshape(batch, heads, -1, v_dim)
    if out.dtype != q.dtype or out.shape != (*q.shape[:3], v_dim):
        return f"shape {tuple(out.shape)} of {out.dtype}"
    sink = None if sinks is None else sinks.double().reshape(1, heads, -1, 1).expand(batch, -1, -1, -1)
    if n == 0:
        return None if not got.any() else "something of nothing"
    s = scaled @ k.mT
    size = scaled.abs().nan_to_num(0, 0, 0) @ k.abs().nan_to_num(0, 0, 0).mT
    error = 2.0**-21 * k.shape[-1] ** 0.5 * size + 1e-44 * k.abs().sum(-1)[:, :, None]
    if logits.softcap:
        # tanh is no steeper than its argument.
        s, error = logits.softcap * torch.tanh(s / logits.softcap), error.clamp_max(2 * logits.softcap) + 1e-6 * abs(s)
    return compare(got, Known(s, error, size), v, sink, torch.finfo(out.dtype))


class Known(NamedTuple):
    """Logits in float64, how far off float32's may be, and the sums of their absolute terms, [B, Hkv, G, S]."""

    logits: Tensor
    error: Tensor
    size: Tensor


def compare(got: Tensor, known: Known, v: Tensor, sink: Tensor | None, form: torch.finfo) -> str | None:
    """Compare outputs with logits that are known up to an error, and values.

    Where logits are exact enough the output is compared; else it lies between the values of the records whose logits
    may be among the highest. What is no number in what was read is none in the answer.
    """
    s, error, size = known
    spoiled = s.isnan().any(-1) | (s == math.inf).any(-1)
    # Nothing is known where float32 overflows.
    unknown = (size > OVERFLOW).any(-1) | (s == -math.inf).all(-1)
    spoiled_values = ~v.isfinite().all(2)[:, :, None].expand_as(got)
    nan = spoiled[..., None].expand_as(got) & ~unknown[..., None]
    if (got.isfinite() & nan).any():
        return "a number, of keys that are none"
    if (got.isfinite() & spoiled_values & ~unknown[..., None]).any():
        return "a number, of values that are none"
    sure = ~(spoiled | unknown)[..., None].expand_as(got) & ~spoiled_values
    sure &= (v.abs().nan_to_num(0, 0, 0).sum(2) < OVERFLOW)[:, :, None]
    if not sure.any():
        return None
    s, v = s.nan_to_num(0, 0, -math.inf), v.nan_to_num(0, 0, 0)
    error = error.nan_to_num(0, 0, 0).masked_fill(s == -math.inf, 0)
    both = s if sink is None else torch.cat([s, sink], -1)
    expected = both.softmax(-1)[..., : s.shape[-1]] @ v
    top = (s - error).amax(-1, True)
    top = top if sink is None else torch.maximum(top, sink)
    # All others weigh less than the tolerance together.
    few = (s + error >= top - 20)[..., None]
    low = v[:, :, None].masked_fill(~few, math.inf).amin(3)
    high = v[:, :, None].masked_fill(~few, -math.inf).amax(3)
    if sink is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
    worst, largest = error.amax(-1)[..., None], v.abs().amax(2)[:, :, None]
    slack = (
        largest * 2.0**-17 + form.eps * torch.maximum(low.abs(), high.abs()).nan_to_num(0, 0, 0) + form.smallest_normal
    )
    close = (got - expected).abs() <= slack + 2 * worst * largest
    fine = torch.where(worst <= EXACT, close, (got >= low - slack) & (got <= high + slack))
    fine |= torch.maximum(low.abs(), high.abs()) > form.max * 0.99
    bad = sure & ~fine
    return f"off by {(got - expected).abs()[bad].max():.3g}" if bad.any() else None


def check_choice(chosen: Tensor, given: dict[str, Any], exact: bool) -> str | None:
    """Check that exactly `cap` are chosen, in order, sinks first, none taken, and (`exact`) nothing better left."""
    index, cap, n, sinks = given["index"], given["cap"], given["n"], given["sinks"]
    leading = index.codes.shape[:2]
    if chosen.shape != (*leading, cap) or chosen.dtype != torch.int64:
        return f"shape {tuple(chosen.shape)}"
    if cap == 0:
        return None
    if chosen.min() < 0 or chosen.max() >= n or (chosen[..., 1:] <= chosen[..., :-1]).any():
        return "positions out of range or order"
    marks = torch.zeros(*leading, n, dtype=torch.bool).scatter(-1, chosen, True)
    free = torch.ones_like(marks)
    if given["taken"] is not None:
        free.scatter_(-1, given["taken"].long(), False)
    if (marks & ~free).any() or not (marks | ~free)[..., : min(sinks, cap)].all():
        return "a taken record, or a sink too few"
    free[..., :sinks] = False
    return check_masses(marks, free, given) if exact else None


def check_masses(marks: Tensor, free: Tensor, given: dict[str, Any]) -> str | None:
    """Check that nothing free weighs more than what was chosen, up to the kernel's promise."""
    index, logits, (batch, heads, n) = given["index"], given["logits"], marks.shape
    keys = decode_nibbles(index.codes[:, :, :n], index.tables, index.query.shape[-1]).double()
    grouped = given["q"].double().reshape(batch, heads, -1, given["q"].shape[-1])
    scores = (grouped @ index.query.double()) * logits.scaling @ keys.mT
    masses = logits.cap(scores).softmax(-1).sum(2)
    worst = masses.where(free & marks, torch.inf).amin(-1)
    best = masses.where(free & ~marks, 0.0).amax(-1)
    short = (worst < best * (1 - TOLERANCE)) & (best > FAINT)
    return f"left {(best / worst)[short].max():.4g} times as heavy" if short.any() else None
