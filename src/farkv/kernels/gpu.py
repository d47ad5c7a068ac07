"""Kernels for a GPU: the interface of `native.Native`, on tensors in near memory.

In: tensors of one layer. Out: chosen positions, attention, rows brought near. No call waits for the device, and none
allocates more than its result once scratch has grown; with `n` (and counts) on the device, a step can be captured in a
CUDA graph and replayed while the context grows. Scratch is kept per stream, so calls on different streams do not share
it. Triton is imported only when a `Gpu` is made.
"""

from __future__ import annotations

import importlib.util
import time
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from farkv._axes import Float, Int, Tensor
from farkv.errors import CacheStateError
from farkv.kernels.native import IndexView, Rows, load_native
from farkv.kernels.near_copies import NearCopies
from farkv.kernels.operands import WHOLE
from farkv.math.logits import Logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("plain", "int8", "int4")
# Bytes of codes that one program of `select` keeps in registers; more would spill.
CODE_BYTES = 1 << 14


class Blocks(NamedTuple):
    """Rows per program of each kernel, and how many programs `attend` should launch."""

    select: int = 1024
    attend: int = 64
    gather: int = 16
    programs: int = 264


class Gpu:
    """The kernels of one GPU; stateless except for scratch memory.

    Args:
        blocks: rows per program; the defaults are for Hopper-class devices.
        interpreted: the kernels run in Triton's interpreter, on a CPU: slow, for tests.
    """

    name = "triton"

    def __init__(self, blocks: Blocks | None = None, *, interpreted: bool = False):
        from farkv.kernels import gpu_attend, gpu_gather, gpu_select

        self._select, self._attend, self._gather = gpu_select, gpu_attend, gpu_gather
        self.blocks, self.interpreted = blocks or Blocks(), interpreted
        self._scratch: dict[tuple[str, int], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Gpu:
        return self

    # --- numbers ----------------------------------------------------------------------------------------------

    def can_read(self, dtype: torch.dtype) -> bool:
        """Return whether plain rows of this dtype can be attended to."""
        return dtype in DTYPES

    def select(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        index: IndexView,
        logits: Logits,
        *,
        cap: int,
        n: int | Tensor,
        sinks: int = 0,
        taken: Int[Tensor, "B Hkv N"] | None = None,
    ) -> Int[Tensor, "B Hkv K"]:
        """Choose exactly `cap` of the first `n` records per sequence and KV head: those of the largest group mass.

            w_s = sum_g softmax_s(softcap(scaling (q_g A) . decode(codes_s)))

        Args:
            n: a number, or one int32 on the device (for graphs; the launches then cover all rows of `index.codes`, and
                the caller must ensure that `cap` records can be chosen).
            sinks: the first records, always chosen unless taken.
            taken: positions that must not be chosen.

        Returns:
            int64 [B, Hkv, cap], ascending. Among equal weights the lowest positions are chosen.

        Raises:
            CacheStateError: fewer than `cap` of the stored records can be chosen.

        Cost: the codes are read twice; 4 bytes per record and head written once and read three times.
        """
        batch, kv_heads, rows, width = index.codes.shape
        n_taken = 0 if taken is None else taken.shape[-1]
        if cap < 1 or (isinstance(n, int) and not cap + n_taken <= n <= rows):
            raise CacheStateError(
                "gpu select: expected 1 <= cap, cap + taken <= n <= stored records, "
                f"got {cap} + {n_taken}, {n}, {rows}; choose fewer records"
            )
        _expect_positions("taken", taken, (batch, kv_heads))
        if index.codes.stride(-1) != 1 or index.tables.shape[2] != 32 * width:
            raise CacheStateError(
                f"gpu select: expected bytes of codes side by side and 16 entries of each of {2 * width} nibbles, got "
                f"strides {index.codes.stride()} and tables {tuple(index.tables.shape)}"
            )
        heads, group = batch * kv_heads, q.shape[1] // kv_heads
        # Sized for the allocation's capacity, so that it does not change while the context grows.
        room = index.codes.stride(1) // max(1, index.codes.stride(2))
        block = min(self.blocks.select, CODE_BYTES // (1 << (width - 1).bit_length()))
        blocks = -(-max(room, rows) // block)
        sizes = self._select.size_scratch(heads, group, index, blocks, block)
        scratch = self._select.Scratch(**{name: self._lend(name, size, q) for name, size in sizes.items()})
        request = self._select.Request(cap, n, sinks, None if taken is None else taken.contiguous())
        with torch.cuda.device_of(q):
            return self._select.run_select(q, index, logits, request, scratch, block)

    def attend(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        rows: Rows,
        logits: Logits,
        *,
        positions: Int[Tensor, "B Hkv K"] | None,
        n: int | Tensor,
        tail: int = 0,
        sinks: Float[Tensor, " Hq"] | None = None,
        counts: Int[Tensor, "B Hkv"] | None = None,
    ) -> Float[Tensor, "B Hq 1 Dv"]:
        """Attend with one query per head: softmax(softcap(scaling q k)) v over some rows, in float32.

        Args:
            rows: near rows; coded ones are decoded and rounded to q's dtype.
            positions: rows to read, besides the `tail` newest of the first `n`. None: all of the first `n`.
            n: a number, or one int32 on the device.
            sinks: logits that only join the denominator.
            counts: on the device: how many of `positions`, or of the rows before the tail, are read.

        Raises:
            CacheStateError: rows of a form or dtype that the kernels do not support, or fewer rows than `n`.

        Cost: every row that is read is read once; 4 Dv bytes per part and query head written and read.
        """
        plain = rows.form == "plain"
        if rows.form not in FORMS or not self.can_read(rows.data.dtype if plain else q.dtype):
            raise CacheStateError(
                f"gpu attend: expected rows of {', '.join(FORMS)} in float32, bfloat16 or float16, got {rows.form} in "
                f"{rows.data.dtype} for queries in {q.dtype}; use the plain path"
            )
        (kv_heads, room), heads = rows.data.shape[1:3], rows.data.shape[0] * rows.data.shape[1]
        if isinstance(n, int) and not tail <= n <= room:
            raise CacheStateError(f"gpu attend: expected tail <= n <= stored records, got {tail}, {n}, {room}")
        _expect_positions("positions", positions, (rows.data.shape[0], kv_heads))
        most = room if positions is None else positions.shape[-1] + tail
        parts = min(-(-most // self.blocks.attend), -(-self.blocks.programs // heads))
        q = q if q.stride(-1) == 1 else q.contiguous()
        sizes = self._attend.size_parts(heads, q.shape[1] // kv_heads, rows.v_dim, max(1, parts))
        scratch = self._attend.Parts(**{name: self._lend(name, size, q) for name, size in sizes.items()})
        at = None if positions is None else positions.contiguous()
        sinks = None if sinks is None else sinks.contiguous()
        selection = self._attend.Selection(at, None if counts is None else counts.contiguous(), n, tail)
        tuning = self._attend.Tuning(self.blocks.attend, max(1, parts), self.interpreted)
        with torch.cuda.device_of(q):
            return self._attend.run_attend(q, rows, logits, selection, sinks, scratch, tuning)

    # --- bytes ------------------------------------------------------------------------------------------------

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy out[j] = data[head heads[j] of all sequences, position positions[j]].

        Args:
            data: [B, Hkv, S, W], near or in pinned host memory, which the kernel reads over the link in place.
            heads, positions: [N], on the device.
            out: [N, W], near, contiguous; or in host memory as the rows are: those a CPU moves (`native.gather`).

        Cost: N rows read (over the link from host memory) and written.
        """
        if out.device.type == "cpu" and not self.interpreted:
            gather_in_host(data, heads, positions, out)
            return
        self._check_rows(data)
        if len(positions) == 0:
            return
        with torch.cuda.device_of(out):
            self._gather.run_gather(data, heads.contiguous(), positions.contiguous(), out, self.blocks.gather)

    def fetch(
        self,
        data: Tensor,
        positions: Int[Tensor, "B Hkv K"],
        out: Tensor,
        crossed: Int[Tensor, " 1"],
        *,
        counts: Int[Tensor, "B Hkv"] | None = None,
        copies: NearCopies | None = None,
    ) -> None:
        """Copy the rows at some positions into a near buffer; rows with a near copy do not cross the link.

        Args:
            data: [B, Hkv, S, W] in pinned host memory.
            out: [B, Hkv, at least K, W], near.
            crossed: int64 on the device, to which the bytes that cross the link are added.
            counts: on the device: how many positions of every head are copied; the other rows are not touched.
            copies: of rows that are near already.

        Cost: the bytes of every row without a near copy over the link; every row written near once.
        """
        for rows in (data, out) if copies is None else (data, out, copies.rows):
            self._check_rows(rows)
        if positions.shape[-1] == 0:
            return
        counts = None if counts is None else counts.contiguous()
        request = self._gather.FetchRequest(positions.contiguous(), counts, copies, out, crossed)
        with torch.cuda.device_of(out):
            self._gather.run_fetch(data, request, self.blocks.gather)

    def read_bandwidth(self, data: Tensor) -> float:
        """Return bytes per second of one sequential pass; waits for the device."""
        words = self._gather.to_words(data.reshape(-1, data.shape[-1]))
        return self._time_sum(words, None, data.numel() * data.element_size())

    def gather_bandwidth(self, data: Tensor, positions: Int[Tensor, " N"], row_bytes: int) -> float:
        """Return bytes per second of reading sorted rows of `row_bytes` each; waits for the device."""
        words = self._gather.to_words(data.reshape(-1).view(torch.uint8).view(-1, row_bytes))
        return self._time_sum(words, positions.contiguous(), len(positions) * row_bytes)

    def _time_sum(self, words: Tensor, positions: Tensor | None, n_bytes: int) -> float:
        n = len(words) if positions is None else len(positions)
        out = self._lend("read", (-(-n // self.blocks.gather), torch.int32), words)
        best = float("inf")
        for _ in range(3):
            self._wait()
            started = time.perf_counter()
            self._gather.run_sum(words, positions, out, self.blocks.gather)
            self._wait()
            best = min(best, time.perf_counter() - started)
        return n_bytes / best

    def _wait(self) -> None:
        # A deliberate sync: a measurement.
        if not self.interpreted:
            torch.cuda.synchronize()

    # --- memory -----------------------------------------------------------------------------------------------

    def _check_rows(self, rows: Tensor) -> None:
        """Raise CacheStateError where the memory layout of rows is not what the kernels address."""
        near = rows.is_cuda or rows.is_pinned() or self.interpreted
        packed = rows.stride(-1) == 1 and rows.stride(-2) == rows.shape[-1]
        if not near or not packed or (rows.shape[0] > 1 and rows.stride(0) != rows.shape[1] * rows.stride(1)):
            raise CacheStateError(
                f"gpu fetch: expected packed rows in GPU or pinned host memory, got strides {tuple(rows.stride())} on "
                f"{rows.device}; keep the pool in pinned memory"
            )

    def _lend(self, name: str, size: tuple[int, torch.dtype], like: Tensor) -> Tensor:
        """Return scratch of at least this many elements; it grows by powers of two and is never freed."""
        n, dtype = size
        # Rows in pinned host memory are read by the current device.
        device = like.device if like.is_cuda or self.interpreted else torch.device("cuda", torch.cuda.current_device())
        key = (name, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        area = self._scratch.get(key)
        if area is None or area.numel() < n or area.device != device:
            area = torch.empty(1 << (n - 1).bit_length(), dtype=dtype, device=device)
            self._scratch[key] = area
        return area


def gather_in_host(data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
    """Copy rows from host memory to host memory, for a staging area that is then copied near in one piece."""
    native = load_native()
    if native is not None:
        native.gather(data, heads, positions, out)
    else:
        rows = data.view(-1, data.shape[3]).index_select(0, heads * data.shape[2] + positions)
        out.copy_(rows.view(out.shape))


def _expect_positions(name: str, positions: Tensor | None, leading: tuple[int, int]) -> None:
    """Raise CacheStateError unless every KV head has positions: the kernels address them by the number of heads."""
    if positions is None:
        return
    if positions.ndim != 3 or positions.shape[:2] != leading or positions.dtype not in WHOLE:
        raise CacheStateError(
            f"gpu kernels: expected {name} that are whole numbers, [{leading[0]}, {leading[1]}, K], got "
            f"{positions.dtype} {tuple(positions.shape)}; pass those of one layer"
        )


@lru_cache(maxsize=1)
def load_gpu() -> Gpu | None:
    """Return the GPU's kernels; None without a CUDA device or without Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    return Gpu()
