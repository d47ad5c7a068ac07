"""Random calls of the native kernels: shapes, strides, dtypes, padding, and values that numbers should not have.

In: a generator. Out: a call, and the check of its answer against float64. `fuzz_kernels.py` makes them for minutes,
`attacks/kernels.py` makes each a try.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from kernel_twins import UNKNOWN, check_attention, check_choice
from torch import Tensor

from farkv.kernels.native import IndexView, Native, Rows, list_native
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": None, "int4": None}
# NaN by bits: quiet ones, one with all bits, one with the low bits alone, both signs.
NANS = torch.tensor([0x7FC00000, -1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
# None: the answer is right. Otherwise what is wrong with it.
Check = Callable[[Any], str | None]


class Call(NamedTuple):
    """A call of one entry point, by its arguments' names, and the check of what it returns."""

    entry: str
    arguments: dict[str, Any]
    check: Check
    isa: str
    threads: int

    def make(self) -> Any:
        """Call; return the answer, for `gather` what was written."""
        kernels, before = Native(self.isa), torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            answer = getattr(kernels, self.entry)(**self.arguments)
        finally:
            torch.set_num_threads(before)
        return self.arguments["out"] if self.entry == "gather" else answer

    def enclose(self, enclose: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with every tensor, and those of index and rows, replaced."""

        def change(x: Any) -> Any:
            if isinstance(x, IndexView | Rows):
                return type(x)(*map(change, x))
            return enclose(x) if isinstance(x, Tensor) else x

        return self._replace(arguments={name: change(x) for name, x in self.arguments.items()})


def draw_call(rng: random.Random, *, wild: bool = True) -> Call:
    """Return a random call; a `wild` one may have values that are no numbers, huge, tiny or equal."""
    torch.manual_seed(rng.getrandbits(40))
    draw = rng.choice([draw_attend, draw_attend, draw_select, draw_select, draw_gather])
    entry, arguments, check = draw(rng, wild)
    return Call(entry, arguments, check, rng.choice(list_native()), rng.choice([1, 1, 2, 3]))


def spread_out(rng: random.Random, rows: Tensor) -> Tensor:
    """Return the same [B, Hkv, S, W] with other strides: in a longer pool, heads inside rows, one for all sequences."""
    how = rng.choice(["as it is", "longer", "heads inside", "wider", "shared"])
    batch, heads, n, width = rows.shape
    # What stands beside the rows must not be read: as numbers it would be NaN.
    worst = math.nan if rows.is_floating_point() else 127
    if how == "longer":
        pool = torch.full((batch, heads, n + rng.randint(1, 40), width), worst, dtype=rows.dtype)
        return pool[:, :, :n].copy_(rows)
    if how == "wider":
        pool = torch.full((batch, heads, n, width + rng.randint(1, 20)), worst, dtype=rows.dtype)
        return pool[..., :width].copy_(rows)
    if how == "heads inside":
        return rows.transpose(1, 2).contiguous().transpose(1, 2)
    return rows[:1].expand(batch, -1, -1, -1) if how == "shared" else rows


def make_wild(rng: random.Random, x: Tensor) -> Tensor:
    """Return x with a few, or all, of its values no numbers, infinite, huge, tiny or equal."""
    kind = rng.choice(["usual", "usual", "nan", "inf", "huge", "large", "tiny", "zero", "equal", "mixed"])
    if kind in ("huge", "large", "tiny", "zero"):
        return x * {"huge": 1e18, "large": 300.0, "tiny": 1e-39, "zero": 0.0}[kind]
    if kind == "equal":
        return torch.full_like(x, rng.choice([1.0, -0.5]))
    if kind == "usual":
        return x
    values = {"nan": NANS, "inf": torch.tensor([math.inf, -math.inf])}.get(kind)
    values = torch.cat([NANS, torch.tensor([math.inf, -math.inf, 3e38, -3e38, 1e-45])]) if values is None else values
    flat = x.clone().view(-1)
    at = torch.randint(0, flat.numel(), (rng.choice([1, 1, 3, flat.numel() // 2 + 1]),))
    flat[at] = values[torch.randint(0, len(values), at.shape)]
    return flat.view(x.shape)


def draw_logits(rng: random.Random, scaling: float, wild: bool) -> Logits:
    """Return a scaling and, at times, a softcap; a `wild` one may be far above the logits."""
    softcap = rng.choice([None, None, 0.5, 30.0, 1e4 if wild else 30.0])
    return Logits(scaling * rng.choice([1.0, 1.0, 4.0, 0.0, -1.0]), softcap)


def draw_attend(rng: random.Random, wild: bool) -> tuple[str, dict[str, Any], Check]:
    """Attend to chosen or all records of some form."""
    batch, heads, group = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 9)
    k_dim, v_dim = (rng.choice([rng.randint(1, 90), 32, 64, 128]) for _ in range(2))
    n, form = rng.choice([1, 2, 15, 16, 17, rng.randint(1, 200), rng.randint(1, 700)]), rng.choice(list(FORMS))
    rows, values = make_rows(rng, form, (batch, heads, n, k_dim, v_dim), wild)
    q = torch.randn(batch, heads * group, 1, k_dim)
    q = (make_wild(rng, q) if wild else q).to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    n, tail = rng.choice([n, rng.randint(1, n)]), 0
    positions, read = None, torch.arange(n).expand(batch, heads, n)
    if rng.random() < 0.7:
        tail = rng.choice([0, 1, min(3, n), n])
        count = 0 if tail == n else rng.choice([0, 1, rng.randint(0, n)])
        positions = torch.randint(0, max(1, n - tail), (batch, heads, count))
        positions = positions.sort().values if rng.random() < 0.7 else positions
        read = torch.cat([positions, torch.arange(n - tail, n).expand(batch, heads, tail)], -1)
        positions = positions.to(rng.choice([torch.int64, torch.int64, torch.int32]))
    sinks = torch.randn(heads * group) if rng.random() < 0.3 else None
    logits = draw_logits(rng, k_dim**-0.5, wild)
    arguments = dict(q=q, rows=rows, logits=logits, positions=positions, n=n, tail=tail, sinks=sinks)
    # The kernel's weights are of the logits as float32 has them.
    taken = values.gather(2, read[..., None].expand(*read.shape, values.shape[-1]))
    return "attend", arguments, lambda out: check_attention(out, q, taken.split([k_dim, v_dim], -1), logits, sinks)


def make_rows(rng: random.Random, form: str, shape: tuple[int, int, int, int, int], wild: bool) -> tuple[Rows, Tensor]:
    """Return records of a form, and the numbers in them, in float64."""
    *leading, k_dim, v_dim = shape
    dtype, kv = FORMS[form], torch.randn(*leading, k_dim + v_dim)
    if dtype is not None:
        kv[..., :k_dim], kv[..., k_dim:] = (
            make_wild(rng, x.clone()) if wild else x for x in kv.split([k_dim, v_dim], -1)
        )
        data = spread_out(rng, kv.to(dtype))
        return Rows(data, k_dim, v_dim), data.double()
    codec = Codec(form, k_dim, v_dim, torch.float32)
    data = codec.encode(kv[..., :k_dim], kv[..., k_dim:])
    if wild and rng.random() < 0.3:
        # Steps may be anything then.
        data = torch.randint(0, 256, data.shape, dtype=torch.uint8)
    data = spread_out(rng, data)
    values = codec.decode(data.clone(memory_format=torch.contiguous_format)).double()
    # A step times a code may overflow where a weight times the step, times the code, does not.
    values[..., k_dim:].nan_to_num_(UNKNOWN, UNKNOWN, UNKNOWN)
    return Rows(data, k_dim, v_dim, form), values


def draw_select(rng: random.Random, wild: bool) -> tuple[str, dict[str, Any], Check]:
    """Choose records by an index."""
    batch, heads, group, dim = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 40)
    wide, stages = rng.choice([1, 1, 2, 8]), rng.choice([1, 2, 4])
    nibbles = 2 * stages * rng.choice([rng.randint(1, 10), 8, 7, 33])
    columns = nibbles // stages * wide
    n = rng.choice([1, 2, 63, 64, 65, rng.randint(1, 500), rng.randint(4224, 7000)])
    codes = torch.randint(-128, 128, (batch, heads, n, nibbles // 2), dtype=torch.int8)
    if rng.random() < 0.1:
        codes[:] = codes[:, :, :1]
    codes, side = spread_out(rng, codes), torch.randn(rng.choice([1, batch]), heads, dim, columns)
    tables = torch.randn(batch, heads, 16 * nibbles, wide)
    q, strange = torch.randn(batch, heads * group, 1, dim), wild and rng.random() < 0.4
    if strange:
        q, side, tables = (make_wild(rng, x) for x in (q, side, tables))
    n_open = rng.choice([n, rng.randint(1, n)])
    taken = None
    if rng.random() < 0.5:
        count = rng.randint(0, min(60, n_open))
        picks = [torch.randperm(n_open)[:count] for _ in range(batch * heads)]
        taken = torch.stack(picks).view(batch, heads, count)
    n_taken = 0 if taken is None else taken.shape[2]
    cap = rng.choice([0, 1, n_open - n_taken, rng.randint(0, n_open - n_taken), (n_open - n_taken) // 20])
    cap, sinks = min(cap, n_open - n_taken), rng.choice([0, 0, 4, 100])
    logits = draw_logits(rng, rng.choice([0.3, 3.0, 30.0]) / math.sqrt(dim * nibbles * wide), wild)
    index = IndexView(codes, side, tables)
    arguments = dict(q=q, index=index, logits=logits, cap=cap, n=n_open, sinks=sinks, taken=taken)
    return "select", arguments, lambda out: check_choice(out, arguments, exact=not strange)


def draw_gather(rng: random.Random, wild: bool) -> tuple[str, dict[str, Any], Check]:
    """Copy rows into one run or several."""
    batch, heads, capacity, width = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 60), rng.randint(1, 70)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.uint8])
    data = torch.randint(0, 256, (batch, heads, capacity, width * dtype.itemsize), dtype=torch.uint8).view(dtype)
    runs, length = rng.choice([(1, rng.randint(0, 700)), (rng.randint(1, 6), rng.randint(0, 50))])
    at = torch.randint(0, batch * heads, (runs * length,)), torch.randint(0, capacity, (runs * length,))
    out = torch.zeros(runs, length + rng.randint(0, 3), width, dtype=dtype)[:, :length]
    out = out[0] if runs == 1 else out
    expected = data.view(batch * heads, capacity, width)[at]

    def check(got: Tensor) -> str | None:
        same = torch.equal(got.contiguous().view(torch.uint8).view(-1), expected.view(torch.uint8).view(-1))
        return None if same else "other bytes"

    return "gather", dict(data=data, heads=at[0], positions=at[1], out=out), check
