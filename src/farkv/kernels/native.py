"""Native CPU kernels: choose records by their codes, attend to records in place, gather rows, measure bandwidth.

In: views of the index and of the pool, never copied. Out: positions, attention output, copied rows, bytes per second.
Each kernel equals its plain twin in `math` up to rounding. Knows tensors and raw views, no methods. Where the library
was not built, `load_native` returns None and nothing here is called.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from typing import Any, NamedTuple

import torch

from farkv._axes import Float, Float32, Int, Tensor
from farkv.errors import CacheStateError, ConfigError
from farkv.kernels.native_abi import (
    BAD_POSITION,
    FORMS,
    ISAS,
    NO_MEMORY,
    AttendArgs,
    GatherArgs,
    SelectArgs,
    count_row_bytes,
    load_library,
)
from farkv.math.logits import Logits

PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class IndexView(NamedTuple):
    """The index of one layer, as it is stored.

    codes: int8 [B, Hkv, S, W], a view; heads and rows may have any stride, bytes of a row are contiguous. With
    `bits` 4, W = R/2 and byte j holds column j in its low half and column j + R/2 in its high half
    (math.score.unpack_codes); with 8, W = R.
    """

    codes: Tensor
    bits: int
    query: Float32[Tensor, "b Hkv D R"]
    scale: Float32[Tensor, "B Hkv 1 R"]


class Rows(NamedTuple):
    """A view of the stored records of one layer.

    data: [B, Hkv, S, W], a row is [k | v]; float32, bfloat16 or float16, or uint8 where they are coded.
    form: "plain", or "int8" or "int4" as in store/far/quantize.py.
    """

    data: Tensor
    k_dim: int
    v_dim: int
    form: str = "plain"


class Native:
    """The kernels for one instruction set. Stateless: scratch memory and threads belong to the library.

    Raises:
        ConfigError: the library was not built, or this machine cannot run the instruction set.
    """

    def __init__(self, isa: str):
        library = load_library()
        possible = [name for name, number in ISAS.items() if library and library.farkv_can_run(number)]
        if library is None or isa not in possible:
            raise ConfigError(
                f"native kernels: expected one of {', '.join(['plain', *possible])} on this machine, got {isa!r}; "
                "set FARKV_KERNEL to one of these or unset it"
            )
        self.name = f"native-{isa}"
        self._library, self._isa = library, ISAS[isa]

    def __deepcopy__(self, memo: dict[int, Any]) -> Native:
        """Return itself: a copied cache runs on the same machine."""
        return self

    def select(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        index: IndexView,
        logits: Logits,
        *,
        cap: int,
        n: int,
        sinks: int = 0,
        taken: Int[Tensor, "B Hkv N"] | None = None,
    ) -> Int[Tensor, "B Hkv K"]:
        """Choose `cap` of the first `n` records per KV head: the first `sinks`, and those of the largest group mass.

        w_s = sum_g softmax_s(softcap(scaling * (q_g A) . (codes_s * scale)))

        Weights within a relative 2^-7 or so may be ranked either way; so may those below 2^-120 of the largest.

        Args:
            taken: positions that must not be chosen, sinks included.

        Returns:
            Positions in ascending order, the same for any number of threads.

        Raises:
            CacheStateError: the arguments' shapes do not match, or fewer than `cap` records can be chosen.

        Cost: n * W index bytes read per KV head, twice for some heads; 2 Hq n R operations.
        """
        codes, side, scale = index.codes, index.query, index.scale
        (batch, heads, stored, width), strides = codes.shape, codes.stride()
        (q_batch, hq, _, dim), columns = q.shape, scale.shape[-1]
        n_taken = 0 if taken is None else taken.shape[-1]
        _expect(
            (codes.dtype == torch.int8 and strides[3] == 1, "contiguous codes of int8", codes),
            (index.bits in (4, 8) and width * 8 == columns * index.bits, "one code per column of the scale", codes),
            (q_batch == batch and hq % heads == 0, "queries of the index's heads", q),
            (
                side.shape[1:] == (heads, dim, columns) and side.shape[0] in (1, batch),
                "a projection of the index's heads",
                side,
            ),
            (scale.shape == (batch, heads, 1, columns), "one step per column", scale),
        )
        if not 0 <= cap + n_taken <= n <= stored:
            raise CacheStateError(
                f"native select: expected cap + taken <= n <= stored records, got {cap} + {n_taken}, {n}, {stored}; "
                "choose fewer records"
            )
        out = torch.empty(batch, heads, cap, dtype=torch.int64)
        operands = [_flat(q), _flat(side), _flat(scale)]
        args = SelectArgs(
            *[x.data_ptr() for x in operands], codes.data_ptr(), _point_at(taken, operands), out.data_ptr(),
            *strides[:3], batch, heads, hq // heads, dim, columns, width, index.bits,
            side.shape[0], n, cap, sinks, n_taken, torch.get_num_threads(), logits.scaling, logits.softcap or 0.0,
        )  # fmt: skip
        if cap:
            self._call("farkv_select", args)
        return out

    def attend(
        self,
        q: Float[Tensor, "B Hq 1 Dk"],
        rows: Rows,
        logits: Logits,
        *,
        positions: Int[Tensor, "B Hkv K"] | None,
        n: int,
        tail: int = 0,
        sinks: Float[Tensor, " Hq"] | None = None,
    ) -> Float[Tensor, "B Hq 1 Dv"]:
        """Attend with one query to chosen records and the `tail` newest of the first `n`; to all n without positions.

        out = softmax(softcap(scaling * q K^T)) V, accumulated in float32; a query that reads nothing gets zeros.

        Args:
            positions: below n - tail; sorted ones are read fastest.
            sinks: logits that only join the denominator.

        Raises:
            CacheStateError: the arguments' shapes do not match, or a position is out of range.

        Cost: (K + tail) row bytes read per KV head, once for the whole query group.
        """
        data = rows.data
        batch, heads, stored, _ = data.shape
        hq = q.shape[1]
        form = PLAIN.get(data.dtype, "") if rows.form == "plain" else rows.form
        itemsize, (*strides, step) = data.element_size(), data.stride()
        row_bytes = count_row_bytes(rows.form, rows.k_dim, rows.v_dim, itemsize)
        _expect(
            (form in FORMS and (rows.form == "plain" or data.dtype == torch.uint8), "records of a known form", data),
            (row_bytes == data.shape[-1] * itemsize and step == 1, "rows of k and v", data),
            (q.shape[0] == batch and hq % heads == 0 and q.shape[-1] == rows.k_dim, "queries of these records", q),
            (positions is None or positions.shape[:2] == (batch, heads), "positions of every KV head", positions),
            (sinks is None or sinks.shape == (hq,), "a sink of every query head", sinks),
        )
        if not 0 <= tail <= n <= stored:
            raise CacheStateError(
                f"native attend: expected tail <= n <= stored records, got {tail}, {n}, {stored}; append them first"
            )
        out = torch.empty(batch, hq, 1, rows.v_dim, dtype=torch.float32)
        operands = [_flat(q)]
        args = AttendArgs(
            operands[0].data_ptr(), data.data_ptr(), _point_at(positions, operands), _point_at(sinks, operands),
            out.data_ptr(), *(stride * itemsize for stride in strides), batch, heads, hq // heads, rows.k_dim,
            rows.v_dim, -1 if positions is None else positions.shape[-1], n, tail, FORMS[form],
            torch.get_num_threads(), logits.scaling, logits.softcap or 0.0,
        )  # fmt: skip
        self._call("farkv_attend", args)
        return out.to(q.dtype)

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy out[j] = data.view(B * Hkv, capacity, W)[heads[j], positions[j]].

        Args:
            out: [N, W], contiguous, or [G, n, W] with N = G n, where each of the G runs is contiguous.

        Raises:
            CacheStateError: the tensors are not contiguous, their shapes do not match, or a row does not exist.

        Cost: N rows read and written.
        """
        _expect((data.ndim == 4 and data.is_contiguous(), "a contiguous pool", data))
        width = data.shape[-1]
        runs = out[None] if out.ndim == 2 else out
        fits = runs.shape[0] * runs.shape[1] == len(heads) and runs.stride()[1:] == (width, 1)
        _expect(
            (fits and runs.shape[2] == width and out.dtype == data.dtype, "room for these rows", out),
            (heads.dtype == torch.int64 and heads.is_contiguous(), "int64 per row", heads),
            (positions.shape == heads.shape and positions.dtype == torch.int64, "int64 per row", positions),
            (positions.is_contiguous(), "contiguous int64 per row", positions),
        )
        args = GatherArgs(
            data.data_ptr(), heads.data_ptr(), positions.data_ptr(), out.data_ptr(), len(heads),
            width * data.element_size(), data.shape[0] * data.shape[1], data.shape[2], torch.get_num_threads(),
            max(1, runs.shape[1]), runs.stride(0) * data.element_size(),
        )  # fmt: skip
        self._call("farkv_gather", args)

    def read_bandwidth(self, data: Tensor) -> float:
        """Return the bytes per second of one sequential read of a contiguous tensor."""
        _expect((data.is_contiguous(), "a contiguous tensor", data))
        n_bytes = data.numel() * data.element_size()
        start = time.perf_counter()
        self._library.farkv_read(self._isa, data.data_ptr(), n_bytes, torch.get_num_threads())
        return n_bytes / (time.perf_counter() - start)

    def gather_bandwidth(self, data: Tensor, positions: Tensor, row_bytes: int) -> float:
        """Return the bytes per second of reading rows of `row_bytes` at sorted positions, prefetched but not copied."""
        _expect((data.is_contiguous(), "a contiguous tensor", data))
        _expect((positions.dtype == torch.int64 and positions.is_contiguous(), "contiguous int64 positions", positions))
        n_rows = data.numel() * data.element_size() // row_bytes
        if len(positions) == 0 or int(positions.min()) < 0 or int(positions.max()) >= n_rows:
            raise CacheStateError(f"gather bandwidth: expected positions within {n_rows} rows; name rows that exist")
        start = time.perf_counter()
        self._library.farkv_read_rows(
            self._isa, data.data_ptr(), positions.data_ptr(), len(positions), row_bytes, torch.get_num_threads()
        )
        return len(positions) * row_bytes / (time.perf_counter() - start)

    def can_read(self, dtype: torch.dtype) -> bool:
        """Return whether plain rows of this dtype can be attended to."""
        return dtype in PLAIN

    def _call(self, name: str, args: ctypes.Structure) -> None:
        status = getattr(self._library, name)(self._isa, ctypes.addressof(args))
        if status == BAD_POSITION:
            raise CacheStateError(f"{name}: a position is out of range; choose among the records that are stored")
        if status == NO_MEMORY:
            raise MemoryError(f"{name}: no memory for scratch")


def _flat(x: Tensor) -> Tensor:
    """Return a small operand as contiguous float32; without a call into torch where it already is."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().float().contiguous()


def _point_at(x: Tensor | None, operands: list[Tensor]) -> int | None:
    """Return the address of an optional operand; appending it to `operands` keeps a converted copy alive."""
    if x is None:
        return None
    operands.append(_flat(x) if x.is_floating_point() else x.to(torch.int64).contiguous())
    return operands[-1].data_ptr()


def _expect(*wanted: tuple[bool, str, Tensor | None]) -> None:
    """Raise CacheStateError unless every condition holds; each comes with what was expected, and of which tensor."""
    for fits, what, got in wanted:
        if not fits:
            form = None if got is None else f"{got.dtype} {tuple(got.shape)} with strides {got.stride()}"
            raise CacheStateError(
                f"native kernels: expected {what}, got {form}; pass tensors of one layer as it is stored"
            )


def list_native() -> tuple[str, ...]:
    """Return the instruction sets that were built and can run here, best first."""
    library = load_library()
    return tuple(name for name, number in ISAS.items() if library and library.farkv_can_run(number))


def load_native() -> Native | None:
    """Return the kernels for the best instruction set, or for the one that FARKV_KERNEL names; None for "plain".

    Raises:
        ConfigError: FARKV_KERNEL names an instruction set that is not known or cannot run here.
    """
    return _load(os.environ.get("FARKV_KERNEL", ""))


@cache
def _load(wanted: str) -> Native | None:
    if wanted == "plain":
        return None
    possible = list_native()
    return Native(wanted or possible[0]) if wanted or possible else None
