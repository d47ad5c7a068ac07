"""What is run, and on what: the plan of an evaluation and the record that lies beside its results."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from farkv.hf.identity import digest_weights


class Variant(NamedTuple):
    """One method at one fraction."""

    method: str
    fraction: float


class Plan(NamedTuple):
    """What to run.

    limit: samples per task and length; seed: of the first, the others follow.  form: auto, completion or chat.
    trace: samples per task and length whose reads are recorded.  workers: processes; threads: of each.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    lengths: tuple[int, ...]
    limit: int = 10
    seed: int = 0
    filler: str = "code"
    form: str = "auto"
    trace: int = 1
    workers: int = 1
    threads: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    profile: str | None = None
    skip_gated: bool = False
    save_prompts: bool = False


def describe_run(plan: Plan, model: Any, skipped: dict[Variant, str]) -> dict[str, Any]:
    """Return `run.json`: enough to run it again, and to know what differs if it comes out otherwise."""
    names = ("farkv", "torch", "transformers", "tokenizers")
    return {
        "model": plan.model,
        "model_sha": digest_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": list(plan.tasks),
        "methods": list(plan.methods),
        "fractions": list(plan.fractions),
        "lengths": list(plan.lengths),
        "limit": plan.limit,
        "seed": plan.seed,
        "filler": plan.filler,
        "form": plan.form,
        "versions": {**{name: version(name) for name in names}, "python": platform.python_version()},
        "machine": describe_machine(),
        "workers": plan.workers,
        "threads": plan.threads,
        "skipped": [{"method": v.method, "fraction": v.fraction, "why": why} for v, why in skipped.items()],
        "command": shlex.join(["farkv", *sys.argv[1:]]),
    }


def describe_machine() -> dict[str, Any]:
    """Return what a reader must know of the machine to make sense of its times."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"processor": processor, "cores": os.cpu_count(), "memory_bytes": memory}
