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
from typing import Any

import torch

from farkv._axes import Float, Int, Tensor
from farkv.errors import CacheStateError, ConfigError
from farkv.kernels.native_abi import (
    BAD_POSITION,
    FORMS,
    ISAS,
    NO_MEMORY,
    AttendArgs,
    GatherArgs,
    SelectArgs,
    TableArgs,
    load_library,
)
from farkv.kernels.native_halves import join_rows, split_rows
from farkv.kernels.native_pages import locate, read_pages
from farkv.kernels.operands import (
    PLAIN,
    IndexView,
    Rows,
    check_attend,
    check_gather,
    check_reading,
    check_select,
    check_tables,
)
from farkv.kernels.ways import Drawn, Paged, Varied
from farkv.math.logits import Logits
from farkv.math.pages import Located
from farkv.math.tables import ROUNDS


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
        varied: Varied | None = None,
        drawn: Drawn | None = None,
        paged: Paged | None = None,
    ) -> Int[Tensor, "B Hkv K"]:
        """Choose `cap` of the first `n` records per KV head: the first `sinks`, and those of the largest group mass.

        w_s = mean_g softmax_s(softcap(scaling * (q_g A) . decode(codes_s)))

        Weights within a relative 2^-7 or so may be ranked either way; so may those below 2^-120 of the largest.

        Args:
            taken: positions below n that must not be chosen, sinks included.
            varied: heads may choose fewer than `cap`.
            drawn: heads with a seed draw their records by weight (`math.sampling.sample_top`); excludes `taken`.
            paged: only records of pages that are in memory, and of few more; sinks where their page is.

        Returns:
            Positions in ascending order, the same for any number of threads; undefined beyond a head's count.

        Raises:
            CacheStateError: the arguments do not fit each other, or fewer than `cap` records can be chosen.

        Cost: n * W index bytes read per KV head, twice for some heads; 2 Hq n R operations.
        """
        check_select(q, index, logits, cap=cap, n=n, sinks=sinks, taken=taken, varied=varied, drawn=drawn, paged=paged)
        codes, side = index.codes, index.query
        batch, heads, _, width = codes.shape
        hq, dim, columns = q.shape[1], q.shape[3], side.shape[3]
        out = torch.empty(batch, heads, cap, dtype=torch.int64)
        operands = [_flat(q), _flat(side), _flat(index.tables)]
        args = SelectArgs(
            *[x.data_ptr() for x in operands], codes.data_ptr(), _point_at(taken, operands), out.data_ptr(),
            *(_point_beside(paged) if varied is None else [x.data_ptr() for x in varied]),
            *([None] * 2 if drawn is None else [x.data_ptr() for x in drawn]),
            None if paged is None else paged.here.data_ptr(),
            *codes.stride()[:3], batch, heads, hq // heads, dim, columns, width, index.tables.shape[3],
            side.shape[0], n, cap, min(sinks, cap), 0 if taken is None else taken.shape[2], torch.get_num_threads(),
            *((0, 0, 0) if paged is None else (paged.here.shape[2], paged.tokens, paged.more)),
            logits.scaling, logits.softcap or 0.0,
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
        counts: Int[Tensor, "B Hkv"] | None = None,
        odds: Float[Tensor, "B Hkv K"] | None = None,
    ) -> Float[Tensor, "B Hq 1 Dv"]:
        """Attend with one query to chosen records and the `tail` newest of the first `n`; to all n without positions.

        out = softmax(softcap(scaling * q K^T)) V, accumulated in float32; a query that reads nothing gets zeros.

        Args:
            positions: below n - tail; sorted ones are read fastest.
            sinks: logits that only join the denominator.
            counts: how many of each head's positions are read, from the first; None: all.
            odds: added to the logits of what is read at positions, after the softcap.

        Raises:
            CacheStateError: the arguments do not fit each other, or a position is out of range.

        Cost: (K + tail) row bytes read per KV head, once for the whole query group.
        """
        operated = {"positions": positions, "counts": counts, "sinks": sinks, "odds": odds}
        form = check_attend(q, rows, logits, n=n, tail=tail, **operated)
        data, hq = rows.data, q.shape[1]
        (batch, heads, *_), itemsize = data.shape, data.element_size()
        out = torch.empty(batch, hq, 1, rows.v_dim, dtype=torch.float32)
        operands = [_flat(q)]
        args = AttendArgs(
            operands[0].data_ptr(), data.data_ptr(), _point_at(positions, operands), _point_at(counts, operands),
            _point_at(sinks, operands), _point_at(odds, operands), out.data_ptr(),
            *[stride * itemsize for stride in data.stride()[:3]],
            batch, heads, hq // heads, rows.k_dim, rows.v_dim, -1 if positions is None else positions.shape[2], n, tail,
            FORMS[form], torch.get_num_threads(), logits.scaling, logits.softcap or 0.0,
        )  # fmt: skip
        self._call("farkv_attend", args)
        return out.to(q.dtype)

    def learn_tables(
        self, keys: Float[Tensor, "B Hkv N R"], weights: Float[Tensor, "B Hkv N"], n_nibbles: int, width: int
    ) -> Float[Tensor, "B Hkv Y W"]:
        """Return nibble tables, as `math.tables.learn_tables`. Cost: the same operations, threads over groups."""
        batch, heads, n, columns = keys.shape
        tables = torch.empty(batch, heads, 16 * n_nibbles, width, dtype=torch.float32)
        check_tables(keys, tables, weights)
        finite = keys.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self._learn([_flat(finite), _flat(weights), tables], None, (batch * heads, n, columns, width, n_nibbles))
        return tables

    def encode_nibbles(
        self, keys: Float[Tensor, "B Hkv T R"], tables: Float[Tensor, "B Hkv Y W"]
    ) -> Int[Tensor, "B Hkv T W2"]:
        """Return the codes of projected keys, as `math.tables.encode_nibbles`. Cost: the same, threads over keys."""
        check_tables(keys, tables, None)
        (batch, heads, n, columns), n_nibbles = keys.shape, tables.shape[2] // 16
        codes = torch.empty(batch, heads, n, n_nibbles // 2, dtype=torch.int8)
        sizes = (batch * heads, n, columns, tables.shape[3], n_nibbles)
        self._learn([_flat(keys), None, tables], codes, sizes)
        return codes

    def _learn(self, operands: list[Tensor | None], codes: Tensor | None, sizes: tuple[int, ...]) -> None:
        pointers = [None if x is None else x.data_ptr() for x in (*operands, codes)]
        self._call("farkv_learn", TableArgs(*pointers, *sizes, ROUNDS, torch.get_num_threads()))

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy out[j] = data.view(B * Hkv, capacity, W)[heads[j], positions[j]].

        Args:
            out: [N, W], contiguous, or [G, n, W] with N = G n, where each of the G runs is contiguous.

        Raises:
            CacheStateError: the arguments do not fit each other, `out` overlaps, or a row does not exist.

        Cost: N rows read and written.
        """
        run, stride = check_gather(data, heads, positions, out)
        itemsize = data.element_size()
        args = GatherArgs(
            data.data_ptr(), heads.data_ptr(), positions.data_ptr(), out.data_ptr(), len(heads),
            data.shape[3] * itemsize, data.shape[0] * data.shape[1], data.shape[2], torch.get_num_threads(),
            max(1, run), stride * itemsize,
        )  # fmt: skip
        self._call("farkv_gather", args)

    def locate(self, table: Tensor, slot_of: Tensor, heads: Tensor, positions: Tensor, tokens: int) -> Located:
        """Return the pages that rows are on; see `native_pages.locate`."""
        return locate(table, slot_of, heads, positions, tokens)

    def read_pages(self, file: tuple[int, int, int], sums: list[int], ids: Tensor, at: Tensor, out: Tensor) -> int:
        """Read pages of a file into their places, verified; see `native_pages.read_pages`."""
        return read_pages(file, sums, ids, at, out)

    def split_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows as pairs of integers, and their units; see `native_halves.split_rows`."""
        return split_rows(self._isa, rows)

    def join_rows(self, products: Tensor, unit: Tensor, bias: Tensor | None) -> Tensor:
        """Return the products of rows from those of their parts; see `native_halves.join_rows`."""
        return join_rows(self._isa, products, unit, bias)

    def read_bandwidth(self, data: Tensor) -> float:
        """Return the bytes per second of one sequential read of a contiguous tensor."""
        check_reading(data)
        n_bytes = data.numel() * data.element_size()
        start = time.perf_counter()
        self._library.farkv_read(self._isa, data.data_ptr(), n_bytes, torch.get_num_threads())
        return n_bytes / (time.perf_counter() - start)

    def gather_bandwidth(self, data: Tensor, positions: Tensor, row_bytes: int) -> float:
        """Return the bytes per second of reading rows of `row_bytes` at sorted positions, prefetched but not copied."""
        check_reading(data, positions, row_bytes)
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


def _point_beside(paged: Paged | None) -> list[int | None]:
    """Return the addresses of a varied choice's parts, of which one on pages has the counts alone."""
    return [None, None, None, None if paged is None else paged.counts.data_ptr(), None]


def _point_at(x: Tensor | None, operands: list[Tensor]) -> int | None:
    """Return the address of an optional operand; appending it to `operands` keeps a converted copy alive."""
    if x is None:
        return None
    operands.append(_flat(x) if x.is_floating_point() else x.to(torch.int64).contiguous())
    return operands[-1].data_ptr()


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
