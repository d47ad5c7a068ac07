"""This machine's processor, as the system describes it: its name, and what it multiplies fast.

In: /proc/cpuinfo, where there is one. Out: names and flags.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
# Flags of a processor that multiplies matrices of this dtype at least as fast as float32. Not avx512_fp16, which torch
# does not use. The two of ARM (bf16, asimdfhm) are torch's conditions, not measured.
FAST_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"amx_fp16", "asimdfhm"},
}


def read_fields() -> dict[str, str]:
    """Return what the system says of the first processor; empty where it does not."""
    lines = CPU_INFO.read_text(errors="replace").splitlines() if CPU_INFO.is_file() else []
    return dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))


def read_cpu_model() -> str:
    """Return the processor's name."""
    fields = read_fields()
    if fields.get("model name"):
        # Virtual machines often hide the name, but not the family.
        numbers = [fields[name] for name in ("cpu family", "model") if fields.get(name)]
        return " ".join([fields["model name"], *(["/".join(numbers)] if numbers else [])])
    arm = [fields[name] for name in ("CPU implementer", "CPU part") if fields.get(name)]
    return " ".join([platform.machine(), *arm]) if arm else platform.processor() or platform.machine()


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices of a half-precision dtype as fast as float32 at least.

    Read, not measured: the same machine always computes in the same dtype, however busy it is.
    """
    fields = read_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return bool(FAST_FLAGS[dtype] & set(flags))
