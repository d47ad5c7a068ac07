"""The C interface of the shared library: its structures, and how it is loaded.

In: the file that the build put beside this one. Out: the loaded library, or None where there is none. Mirrors
csrc/farkv.h. Calls go through ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import c_double, c_int, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch

from farkv.errors import ConfigError

LIBRARY = Path(__file__).with_name("_native.so")
FORMS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
# Instruction sets, best first, each with its number in the library.
ISAS = {"avx512vbmi": 3, "avx512": 2, "avx2": 1, "neon": 4, "generic": 0}
NO_MEMORY, BAD_POSITION = 1, 2


class AttendArgs(ctypes.Structure):
    """`struct attend_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("q", "rows", "positions", "counts", "sinks", "odds", "out")],
        *[(name, c_int64) for name in ("batch_stride", "head_stride", "row_stride")],
        *[(name, c_int64) for name in ("batch", "heads", "group", "k_dim", "v_dim")],
        *[(name, c_int64) for name in ("n_chosen", "n_rows", "tail", "form", "threads")],
        *[(name, c_double) for name in ("scaling", "softcap")],
    )


class SelectArgs(ctypes.Structure):
    """`struct select_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("q", "query", "tables", "codes", "taken", "out")],
        *[(name, c_void_p) for name in ("caps", "least", "fewest", "counts", "floors", "seeds", "odds", "here")],
        *[(name, c_int64) for name in ("batch_stride", "head_stride", "row_stride")],
        *[(name, c_int64) for name in ("batch", "heads", "group", "dim", "columns", "code_bytes", "width")],
        *[(name, c_int64) for name in ("query_batch", "n", "cap", "sinks", "n_taken", "threads")],
        *[(name, c_int64) for name in ("pages", "page_tokens", "more_pages")],
        *[(name, c_double) for name in ("scaling", "softcap")],
    )


class GatherArgs(ctypes.Structure):
    """`struct gather_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("data", "heads", "positions", "out")],
        *[(name, c_int64) for name in ("n", "row_bytes", "n_heads", "capacity", "threads")],
        *[(name, c_int64) for name in ("run", "out_stride")],
    )


class TableArgs(ctypes.Structure):
    """`struct table_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("keys", "weights", "tables", "codes")],
        *[(name, c_int64) for name in ("heads", "n", "columns", "width", "nibbles", "rounds", "threads")],
    )


class PageArgs(ctypes.Structure):
    """`struct page_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("ids", "at", "sums", "out")],
        *[(name, c_int64) for name in ("n", "fd", "base", "page_bytes", "threads")],
    )


class LocateArgs(ctypes.Structure):
    """`struct locate_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("table", "slot_of", "heads", "positions")],
        *[(name, c_void_p) for name in ("which", "offsets", "pages", "slots", "counts")],
        *[(name, c_int64) for name in ("n", "n_heads", "capacity", "n_pages", "tokens", "n_found")],
    )


class HalvesArgs(ctypes.Structure):
    """`struct halves_args`."""

    _fields_ = (
        *[(name, c_void_p) for name in ("rows", "products", "unit", "bias")],
        *[(name, c_int64) for name in ("n", "width", "threads")],
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built.

    Raises:
        ConfigError: it was built from other sources.
    """
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    structures = (AttendArgs, SelectArgs, GatherArgs, TableArgs, PageArgs, LocateArgs, HalvesArgs)
    ours = [ctypes.sizeof(args) for args in structures]
    if not hasattr(library, "farkv_size") or [library.farkv_size(c_int64(i)) for i in range(len(ours))] != ours:
        raise ConfigError(
            f"native kernels: expected {LIBRARY.name} to be built from these sources, got one from others; install "
            "farkv again (from a checkout: pip install -e .), or set FARKV_KERNEL=plain"
        )
    library.farkv_can_run.argtypes = [c_int64]
    for name in ("attend", "select", "gather", "learn"):
        call = getattr(library, f"farkv_{name}")
        call.argtypes, call.restype = [c_int64, c_void_p], c_int
    for name in ("split", "join"):
        call = getattr(library, f"farkv_{name}")
        call.argtypes, call.restype = [c_int64, c_void_p], None
    library.farkv_read_pages.argtypes, library.farkv_read_pages.restype = [c_void_p], c_int64
    library.farkv_locate.argtypes, library.farkv_locate.restype = [c_void_p], c_int
    library.farkv_crc32.argtypes, library.farkv_crc32.restype = [c_void_p, c_int64], c_uint32
    library.farkv_read.argtypes = [c_int64, c_void_p, c_int64, c_int64]
    library.farkv_read_rows.argtypes = [c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64]
    library.farkv_read.restype = library.farkv_read_rows.restype = c_uint64
    library.farkv_use_openmp.argtypes, library.farkv_use_openmp.restype = [c_void_p], None
    if threading.current_thread() is threading.main_thread():
        library.farkv_use_openmp(find_openmp())
    return library


def find_openmp() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP that torch brought along and loaded; None if there is none."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        try:
            # Only what is loaded already: another copy would have threads of its own.
            loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        return ctypes.cast(loaded.GOMP_parallel, c_void_p).value
    return None


def count_row_bytes(form: str, k_dim: int, v_dim: int, itemsize: int) -> int:
    """Return the bytes of one record, as defined in store/far/quantize.py."""
    if form == "plain":
        return (k_dim + v_dim) * itemsize
    bits, kinds = (8, 1) if form == "int8" else (4, 2)
    codes = -(-k_dim * bits // 8) - (-v_dim * bits // 8)
    return codes + codes % 2 + 2 * kinds * (-(-k_dim // 32) - (-v_dim // 32))
