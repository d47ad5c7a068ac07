"""Compile the native CPU kernels while the package is built.

In: the C sources of farkv/kernels/csrc, CC and CFLAGS of the environment. Out: one shared library beside native.py; the
wheel is tagged for this platform and any Python. Without a working compiler it is pure, and torch computes instead.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("src/farkv/kernels")
LIBRARY = "_native.so"
BASE = "-std=gnu11 -O2 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread".split()
AVX2 = "-mavx2 -mfma -mf16c -mpopcnt".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
# The least of every machine of a kind. After CFLAGS: what is built on one machine, with its -march=native, must run on
# others, whose instruction set is asked for at run time (csrc/dispatch.c). -mno-sse3 takes all that builds on it away.
LEAST = {
    "x86_64": "-march=x86-64 -mno-sse3 -mno-popcnt -mno-lzcnt -mno-bmi -mno-bmi2 -mno-movbe".split(),
    "aarch64": ["-march=armv8-a"],
}
LEAST |= {"AMD64": LEAST["x86_64"], "arm64": LEAST["aarch64"]}
X86 = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512vbmi": [*AVX512, "-mavx512vnni", "-mavx512vbmi"]}
ARM = {"generic": [], "neon": []}


def list_units(machine: str) -> dict[str, list[str]]:
    """Return the flags of each instruction set that the machine's compiler can make."""
    if machine in ("x86_64", "AMD64", "i686"):
        return X86
    return ARM if machine in ("aarch64", "arm64") else {"generic": []}


def list_commands(sources: Path, machine: str) -> dict[str, list[str]]:
    """Return the command that compiles each object, but for `-o`."""
    cc, least = shlex.split(os.environ.get("CC", "cc")), LEAST.get(machine, [])
    flags = [*BASE, *shlex.split(os.environ.get("CFLAGS", "")), *least]
    made = {name: [*more, f"-DFARKV_ISA={name}", "unit.c"] for name, more in list_units(machine).items()}
    made |= {"dispatch": ["dispatch.c"], "pool": ["pool.c"], "pages": ["pages.c"]}
    return {name: [*cc, *flags, *more, "-c", str(sources / source)] for name, (*more, source) in made.items()}


def compile_library(root: Path, out: Path, machine: str) -> None:
    """Compile and link all kernels into `out`.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it failed; its output is in `stderr`.
    """
    commands = list_commands(root / KERNELS / "csrc", machine)
    link = [*shlex.split(os.environ.get("CC", "cc")), *BASE, *shlex.split(os.environ.get("CFLAGS", "")), "-shared"]
    with tempfile.TemporaryDirectory() as work:
        objects = [f"{work}/{name}.o" for name in commands]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, [[*command, "-o", to] for command, to in zip(commands.values(), objects, strict=True)]))
        run([*link, *objects, "-o", f"{work}/{LIBRARY}", "-lm"])
        out.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old library loaded keeps it: the name gets a new file.
        shutil.copyfile(f"{work}/{LIBRARY}", out.with_suffix(".new"))
        out.with_suffix(".new").replace(out)


def run(command: list[str]) -> None:
    """Run the compiler."""
    subprocess.run(command, check=True, capture_output=True, text=True)


def is_fresh(root: Path, out: Path) -> bool:
    """Whether a library was compiled after the last change of its sources, as the compiler does without being asked."""
    sources = [Path(__file__), *(root / KERNELS / "csrc").iterdir()]
    usual = not {"CC", "CFLAGS"} & os.environ.keys()
    return usual and out.exists() and out.stat().st_mtime > max(p.stat().st_mtime for p in sources)


class CustomBuildHook(BuildHookInterface):
    """What hatchling calls before it writes a wheel, editable or not."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; put the library into the source tree (editable) or into the wheel."""
        root = Path(self.root)
        editable = version == "editable"
        out = root / (KERNELS if editable else "build") / LIBRARY
        if editable and is_fresh(root, out):
            return
        try:
            compile_library(root, out, platform.machine())
        except (OSError, subprocess.CalledProcessError) as error:
            out.unlink(missing_ok=True)
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            why = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
            self.app.display_warning(f"farkv: native kernels were not built, torch computes instead: {why}")
            return
        if not editable:
            build_data["force_include"][str(out)] = f"farkv/kernels/{LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
