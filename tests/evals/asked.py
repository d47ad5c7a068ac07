"""The demo model and its judge, loaded once; a small plan, and samples of its tasks in code."""

from __future__ import annotations

from functools import cache
from typing import Any

from farkv.evals.describe import EvalPlan
from farkv.evals.judge import Judge
from farkv.evals.sample import Sample
from farkv.evals.text import Maker
from farkv.hf.load import load_model

PLAN = EvalPlan("demo", ("niah_multikey",), ("full", "infinigen", "window"), (0.1,), (512,), limit=2, threads=1)


@cache
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


@cache
def judge() -> Judge:
    return Judge(*demo())


def make(task: str, length: int = 512, seed: int = 0) -> Sample:
    return Maker(demo()[1]).make(task, length, seed)
