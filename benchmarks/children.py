"""Interpreters that measure one thing each, so that nothing of one is in another's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start_script(script: str | Path, *options: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a script of this folder, to be talked to line by line."""
    command = [sys.executable, str(script), *map(str, options)]
    return subprocess.Popen(
        command, env=os.environ | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_script(script: str | Path, *options: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a script of this folder and return the JSON of its last line."""
    child = start_script(script, *options, env=env)
    out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"{script}: the child ended with {child.returncode}")
    return json.loads(out.splitlines()[-1])


def return_freed(threshold: int) -> dict[str, str]:
    """Return the environment in which freed memory above a size goes back, so that what is resident is in use."""
    return {"MALLOC_MMAP_THRESHOLD_": str(threshold), "MALLOC_TRIM_THRESHOLD_": str(threshold)}


def read_memory() -> dict[str, int]:
    """Return the resident set, its peak, and the part of it that is no file's, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def forget_peak() -> None:
    """Let the resident set's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def forget_files(*paths: Path) -> None:
    """Write files to the disk and make the system forget its copies."""
    for path in paths:
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
