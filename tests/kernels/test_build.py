"""How the library is compiled: each unit for its own instruction set, whatever CFLAGS of the machine say."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src/farkv/kernels/csrc"
pytest.importorskip("hatchling")
if not (ROOT / "hatch_build.py").is_file() or not SOURCES.is_dir():
    pytest.skip("no build here", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from hatch_build import list_commands, list_units  # noqa: E402

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None, reason="asks a C compiler for x86-64"
)
SETS = [
    "__SSE3__",
    "__SSE4_2__",
    "__AVX__",
    "__AVX2__",
    "__FMA__",
    "__F16C__",
    "__POPCNT__",
    "__AVX512F__",
    "__AVX512VNNI__",
    "__AVX512VBMI__",
    "__BMI2__",
]
AVX2 = set(SETS[:7])
WANTED = {"generic": set(), "avx2": AVX2, "avx512": AVX2 | {"__AVX512F__"}, "avx512vbmi": AVX2 | set(SETS[7:10])}


@pytest.mark.parametrize("cflags", ["", "-march=native", "-march=x86-64-v4", "-mavx2 -mbmi2 -march=x86-64-v3"])
def test_a_unit_has_the_instructions_of_its_name_alone(monkeypatch: pytest.MonkeyPatch, cflags: str) -> None:
    monkeypatch.setenv("CFLAGS", cflags)
    for name, command in list_commands(SOURCES, "x86_64").items():
        done = subprocess.run([*command, "-dM", "-E"], capture_output=True, text=True, check=True)
        macros = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define")}
        assert macros & set(SETS) == WANTED.get(name, set()), name


def test_flags_that_forget_nan_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-ffast-math")
    command = list_commands(SOURCES, "x86_64")["generic"]
    done = subprocess.run([*command, "-E", "-o", "/dev/null"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the kernels tell NaN" in done.stderr


def test_every_machine_has_a_unit_for_any_of_its_kind() -> None:
    for machine in ("x86_64", "AMD64", "aarch64", "arm64", "riscv64"):
        assert "generic" in list_units(machine)
        assert "generic" in list_commands(SOURCES, machine)
