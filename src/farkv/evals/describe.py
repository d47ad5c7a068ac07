"""The settings of an evaluation, and the record of the run that is stored with its results."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from farkv.calibrate.processor import read_cpu_model
from farkv.hf.identity import digest_weights


class Variant(NamedTuple):
    """One method at one fraction."""

    method: str
    fraction: float


class EvalPlan(NamedTuple):
    """The settings of a run.

    limit: samples per task and length.  seed: of the first sample; the others count up from it.  filler: None: that of
    the form.  form: a name in `prompter.FORMS`.  trace: samples per task and length whose reads are traced.  workers:
    processes.  threads: per process.  batch: samples that are answered together.  prompts: a file of `--save-prompts`
    whose prompts are asked, none are made.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    lengths: tuple[int, ...]
    limit: int = 10
    seed: int = 0
    filler: str | None = None
    form: str = "auto"
    trace: int = 1
    workers: int = 1
    threads: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    profile: str | None = None
    save_prompts: bool = False
    batch: int = 1
    prompts: str | None = None


def describe_run(plan: EvalPlan, loaded: Any, skipped: dict[Variant, str]) -> dict[str, Any]:
    """Return the content of `run.json`: enough to repeat the run, and to explain different results."""
    names = ("farkv", "torch", "transformers", "tokenizers")
    return {
        "model": plan.model,
        "model_sha": digest_weights(loaded.model),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "tasks": list(plan.tasks),
        "methods": list(plan.methods),
        "fractions": list(plan.fractions),
        "lengths": list(plan.lengths),
        "limit": plan.limit,
        "seed": plan.seed,
        "filler": loaded.maker.filler,
        "form": loaded.form,
        "versions": {**{name: version(name) for name in names}, "python": platform.python_version()},
        "machine": describe_machine(loaded.model.device),
        "batch": plan.batch,
        "workers": plan.workers,
        "threads": plan.threads,
        "skipped": [{"method": v.method, "fraction": v.fraction, "why": why} for v, why in skipped.items()],
        "command": shlex.join(["farkv", *sys.argv[1:]]),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the facts about the machine that are needed to interpret times."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    facts = {"processor": read_cpu_model(), "cores": os.cpu_count(), "memory_bytes": memory}
    return facts | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
