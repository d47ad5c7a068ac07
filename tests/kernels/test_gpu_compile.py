"""What the interpreter runs is also what the compiler takes: every kernel becomes machine code for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "select": {"_project", "_measure", "_tabulate", "_weigh", "_exclude", "_refine", "_count", "_write"},
    "attend": {"_attend", "_join", "_gather", "_fetch"},
}


@pytest.mark.parametrize("part", KERNELS)
def test_every_kernel_is_compiled_for_hopper(part: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.7")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    program = Path(__file__).parent / "gpu_compile.py"
    done = subprocess.run([sys.executable, program, part], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = dict(line.split() for line in done.stdout.splitlines())
    assert set(compiled) == KERNELS[part]
    assert all(int(n_bytes) > 0 for n_bytes in compiled.values())
