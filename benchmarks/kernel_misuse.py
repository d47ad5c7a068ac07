"""Calls of the native kernels with one argument that does not fit: every one must be refused before C is entered.

In: a right call's arguments. Out: the same with one of them wrong. Used by `attacks/kernels.py` and by the kernels'
own tests, which make each once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farkv.kernels.native import IndexView, Native, Rows
from farkv.math.logits import Logits

Arguments = dict[str, Any]
# Changes arguments in place.
Change = Callable[[Arguments], None]


def make_right(entry: str) -> Arguments:
    """Return arguments that fit: two sequences, three KV heads, two queries each, 40 records."""
    q, positions = torch.randn(2, 6, 1, 16), torch.arange(5).expand(2, 3, 5).clone()
    if entry == "select":
        codes = torch.randint(-128, 128, (2, 3, 40, 8), dtype=torch.int8)
        index = IndexView(codes, torch.randn(2, 3, 16, 16), torch.randn(2, 3, 256, 2))
        return dict(q=q, index=index, logits=Logits(0.25), cap=6, n=38, sinks=2, taken=positions + 7)
    if entry == "attend":
        rows = Rows(torch.randn(2, 3, 40, 28), 16, 12)
        return dict(q=q, rows=rows, logits=Logits(0.25), positions=positions, n=38, tail=3, sinks=torch.randn(6))
    data = torch.randn(2, 3, 40, 28)
    if entry == "gather":
        heads, at = torch.arange(6).repeat_interleave(5), torch.arange(30)
        return dict(data=data, heads=heads, positions=at, out=torch.empty(6, 5, 28))
    return dict(data=data) | (dict(positions=torch.arange(30), row_bytes=112) if entry == "gather_bandwidth" else {})


def call(kernels: Native, entry: str, given: Arguments) -> Any:
    """Call an entry point as a user does: in the tests a check of the annotated shapes stands before it."""
    return inspect.unwrap(getattr(Native, entry))(kernels, **given)


def put(**values: Any) -> Change:
    """Return a change that sets arguments."""
    return lambda given: given.update(values)


def turn(name: str, how: Callable[[Any], Any]) -> Change:
    """Return a change of one argument; `name` may be that of a field of index or rows: "index.codes"."""
    owner, _, field = name.partition(".")

    def change(given: Arguments) -> None:
        old = given[owner]
        given[owner] = old._replace(**{field: how(getattr(old, field))}) if field else how(old)

    return change


def poke(value: int) -> Callable[[Tensor], Tensor]:
    """Return what sets the last position."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x

    return change


def to_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def skip(x: Tensor) -> Tensor:
    """Return the same shape, every second number of memory."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def alias(given: Arguments) -> None:
    """Let the output stand within the pool."""
    given["out"] = given["data"].view(240, 28)[100:130].view(6, 5, 28)


def take_heads(given: Arguments) -> None:
    """Leave no heads."""
    rows = given.get("rows")
    if rows is None:
        index = given["index"]
        given["index"] = IndexView(index.codes[:, :0], index.query[:, :0], index.tables[:, :0])
        given["taken"] = given["taken"][:, :0]
    else:
        given["rows"], given["sinks"] = rows._replace(data=rows.data[:, :0]), given["sinks"][:0]
        given["positions"] = given["positions"][:, :0]
    given["q"] = given["q"][:, :0]


def disguise(given: Arguments) -> None:
    """Call coded rows float32: a row of 16 + 12 numbers would be 112 bytes of 20."""
    data = torch.zeros(2, 3, 40, 22, dtype=torch.uint8)
    given["rows"] = Rows(data, 16, 12, "float32")


QUERIES: dict[str, Change] = {
    "q: two queries": turn("q", lambda q: q.expand(-1, -1, 2, -1)),
    "q: half the numbers": turn("q", lambda q: q[..., :8]),
    "q: no number of the heads": turn("q", lambda q: q[:, :5]),
    "q: no heads": turn("q", lambda q: q[:, :0]),
    "q: one sequence": turn("q", lambda q: q[:1]),
    "q: three dimensions": turn("q", lambda q: q[0]),
    "q: elsewhere": turn("q", to_meta),
    "q: whole numbers": turn("q", lambda q: q.long()),
    "q: complex": turn("q", lambda q: q.cfloat()),
    "no heads at all": take_heads,
    "scaling: NaN": put(logits=Logits(math.nan)),
    "scaling: beyond float32": put(logits=Logits(1e300)),
    "softcap: NaN": put(logits=Logits(1.0, math.nan)),
    "softcap: beyond float32": put(logits=Logits(1.0, 1e300)),
    "n: more than stored": put(n=41),
    "n: past 64 bits": put(n=2**64 + 38),
    "n: negative": put(n=-1),
}


def spoil_positions(name: str, end: int) -> dict[str, Change]:
    """Return changes of positions of every KV head, below `end`."""
    return {
        f"{name}: one head": turn(name, lambda x: x[:, :1]),
        f"{name}: one sequence": turn(name, lambda x: x[:1]),
        f"{name}: of one sequence and head": turn(name, lambda x: x[0, 0]),
        f"{name}: two dimensions": turn(name, lambda x: x[..., 0]),
        f"{name}: four dimensions": turn(name, lambda x: x[..., None]),
        f"{name}: numbers that are not whole": turn(name, lambda x: x.float()),
        f"{name}: a mask": turn(name, lambda x: x > 3),
        f"{name}: elsewhere": turn(name, to_meta),
        f"{name}: negative": turn(name, poke(-1)),
        f"{name}: the end": turn(name, poke(end)),
        f"{name}: far beyond": turn(name, poke(1 << 40)),
    }


WRONG: dict[str, dict[str, Change]] = {
    "select": {
        **QUERIES,
        **spoil_positions("taken", 38),
        "codes: uint8": turn("index.codes", lambda x: x.view(torch.uint8)),
        "codes: three dimensions": turn("index.codes", lambda x: x[0]),
        "codes: bytes apart": turn("index.codes", skip),
        "codes: no bytes": turn("index.codes", lambda x: x[..., :0]),
        "codes: elsewhere": turn("index.codes", to_meta),
        "projection: one head": turn("index.query", lambda x: x[:, :1]),
        "projection: half the numbers": turn("index.query", lambda x: x[:, :, :8]),
        "projection: other columns": turn("index.query", lambda x: x[..., :6]),
        "projection: of three sequences": turn("index.query", lambda x: x[:1].repeat(3, 1, 1, 1)),
        "projection: of no sequence": turn("index.query", lambda x: x[:0]),
        "projection: elsewhere": turn("index.query", to_meta),
        "tables: one sequence": turn("index.tables", lambda x: x[:1]),
        "tables: one head": turn("index.tables", lambda x: x[:, :1]),
        "tables: half the nibbles": turn("index.tables", lambda x: x[:, :, :128]),
        "tables: of three columns": turn("index.tables", lambda x: x[..., :1].repeat(1, 1, 1, 3)),
        "tables: of no column": turn("index.tables", lambda x: x[..., :0]),
        "tables: whole numbers": turn("index.tables", lambda x: x.long()),
        "tables: elsewhere": turn("index.tables", to_meta),
        "cap: negative": put(cap=-3),
        "cap: more than are left": put(cap=34),
        "cap: past 64 bits": put(cap=2**64 + 2),
        "sinks: negative": put(sinks=-1),
    },
    "attend": {
        **QUERIES,
        **spoil_positions("positions", 35),
        "tail: negative": put(tail=-1),
        "tail: more than n": put(tail=39),
        "rows: three dimensions": turn("rows.data", lambda x: x[0]),
        "rows: float64": turn("rows.data", lambda x: x.double()),
        "rows: bytes": turn("rows.data", lambda x: x.to(torch.uint8)),
        "rows: numbers apart": turn("rows.data", skip),
        "rows: cut": turn("rows.data", lambda x: x[..., :27]),
        "rows: elsewhere": turn("rows.data", to_meta),
        "rows: another form": turn("rows.form", lambda _: "int8"),
        "rows: an unknown form": turn("rows.form", lambda _: "int2"),
        "rows: plain in name": disguise,
        "k: too long": turn("rows.k_dim", lambda _: 28),
        "v: too short": turn("rows.v_dim", lambda _: 11),
        "v: negative": put(rows=Rows(torch.randn(2, 3, 40, 12), 16, -4)),
        "v: none": put(rows=Rows(torch.randn(2, 3, 40, 16), 16, 0)),
        "sinks: of KV heads": turn("sinks", lambda x: x[:3]),
        "sinks: two dimensions": turn("sinks", lambda x: x[None]),
        "sinks: whole numbers": turn("sinks", lambda x: x.long()),
        "sinks: elsewhere": turn("sinks", to_meta),
    },
    "gather": {
        "pool: three dimensions": turn("data", lambda x: x[0]),
        "pool: not contiguous": turn("data", lambda x: x.transpose(0, 1)),
        "pool: elsewhere": turn("data", to_meta),
        "heads: fewer": turn("heads", lambda x: x[:29]),
        "heads: two dimensions": turn("heads", lambda x: x.view(6, 5)),
        "heads and positions: two dimensions": lambda g: g.update(
            heads=g["heads"].view(6, 5), positions=g["positions"].view(6, 5), out=torch.empty(6, 28)
        ),
        "heads: int32": turn("heads", lambda x: x.int()),
        "heads: negative": turn("heads", poke(-1)),
        "heads: the end": turn("heads", poke(6)),
        "positions: fewer": turn("positions", lambda x: x[:29]),
        "positions: apart": turn("positions", skip),
        "positions: numbers that are not whole": turn("positions", lambda x: x.double()),
        "positions: negative": turn("positions", poke(-1)),
        "positions: the end": turn("positions", poke(40)),
        "positions: far beyond": turn("positions", poke(1 << 60)),
        "positions: elsewhere": turn("positions", to_meta),
        "out: too few rows": turn("out", lambda x: x[:, :4]),
        "out: too many rows": turn("out", lambda x: torch.empty(7, 5, 28)),
        "out: narrower": turn("out", lambda x: x[..., :27]),
        "out: another dtype": turn("out", lambda x: x.int()),
        "out: one dimension": turn("out", lambda x: x.view(-1)),
        "out: four dimensions": turn("out", lambda x: x[None]),
        "out: every run in one place": turn("out", lambda x: x[:1].expand(6, -1, -1)),
        "out: runs that overlap": turn("out", lambda x: x.as_strided((6, 5, 28), (28, 28, 1))),
        "out: rows that overlap": turn("out", lambda x: x.as_strided((6, 5, 28), (140, 27, 1))),
        "out: within the pool": alias,
        "out: elsewhere": turn("out", to_meta),
    },
    "read_bandwidth": {
        "data: not contiguous": turn("data", lambda x: x.transpose(0, 1)),
        "data: elsewhere": turn("data", to_meta),
    },
    "gather_bandwidth": {
        "data: not contiguous": turn("data", lambda x: x.transpose(0, 1)),
        "row_bytes: none": put(row_bytes=0),
        "row_bytes: negative": put(row_bytes=-112),
        "row_bytes: more than all": put(row_bytes=1 << 40),
        "positions: none": turn("positions", lambda x: x[:0]),
        "positions: two dimensions": turn("positions", lambda x: x.view(6, 5)),
        "positions: int32": turn("positions", lambda x: x.int()),
        "positions: negative": turn("positions", poke(-1)),
        "positions: the end": turn("positions", poke(240)),
        "positions: elsewhere": turn("positions", to_meta),
    },
}
