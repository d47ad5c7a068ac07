"""What one process of an evaluation does: it loads the model once, then takes samples one after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from farkv.errors import ConfigError, InputError
from farkv.evals.describe import Plan, Variant
from farkv.evals.judge import Judge, Reference
from farkv.evals.row import Row
from farkv.evals.sample import Sample
from farkv.evals.text import Maker
from farkv.hf.load import load_model, quiet_libraries

Found = list[tuple[Row, dict[str, Any] | None]]


class Job(NamedTuple):
    """One sample. Without variants: the full cache's answer. full: that answer, where it is known."""

    sample: Sample
    variants: tuple[Variant, ...]
    full: Row | None
    traced: bool


class Cell(NamedTuple):
    """One task at one length: its samples."""

    task: str
    length: int
    samples: list[Sample]


class Loaded:
    """A model that is ready to be asked."""

    def __init__(self, plan: Plan):
        quiet_libraries()
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        self.model, self.tokenizer = load_model(plan.model, dtype=plan.dtype, device=plan.device)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(f"tokenizer {type(self.tokenizer).__name__}: expected a fast one, with token offsets")
        self.judge = Judge(self.model, self.tokenizer, plan.form, False if plan.profile == "none" else plan.profile)
        self.maker = Maker(self.tokenizer, plan.filler)

    def check_lengths(self, plan: Plan) -> None:
        """Refuse contexts that the model has no positions for.

        Raises:
            ConfigError: a length is beyond them.
        """
        most = getattr(self.model.config, "max_position_embeddings", None)
        too_long = [n for n in plan.lengths if most is not None and n > most]
        if too_long:
            raise ConfigError(f"--lengths: {plan.model} has {most} positions, got {too_long[0]}; give shorter ones")

    def cells(self, plan: Plan) -> Iterator[Cell]:
        """Make the samples, a task and length at a time; tasks with a colon are files (`ruler:PATH`)."""
        for task in plan.tasks:
            if ":" in task:
                yield from self.load_cells(task, plan)
                continue
            for length in plan.lengths:
                seeds = range(plan.seed, plan.seed + plan.limit)
                yield Cell(task, length, [self.maker.make(task, length, seed) for seed in seeds])

    def load_cells(self, spec: str, plan: Plan) -> list[Cell]:
        """Return the cells of a public set."""
        # Its formats are read only where they are asked for.
        from farkv.evals.public import load_public

        grouped: dict[tuple[str, int], list[Sample]] = {}
        for sample in load_public(spec, self.tokenizer, plan.lengths, plan.limit, plan.seed):
            grouped.setdefault((sample.task, sample.length), []).append(sample)
        return [Cell(*key, list(islice(samples, plan.limit))) for key, samples in grouped.items()]


def do_job(job: Job, loaded: Loaded | None = None) -> Found:
    """Answer one sample, with the full cache or with every method."""
    judge = (loaded or _worker[0]).judge
    if not job.variants:
        prompt, prefilled = judge.read(job.sample)
        return [(judge.ask_full(job.sample, prompt, prefilled).row, None)]
    # Predictions are not kept in rows: where they are needed the full cache makes them again.
    known = None if job.full is None or job.sample.continuation else Reference(job.full, None)
    return list(judge.ask_all(job.sample, list(job.variants), known, traced=job.traced))


def start_worker(plan: Plan) -> None:
    """Load the model of a process of several."""
    _worker.append(Loaded(plan))


# The model of this process, where it is one of several.
_worker: list[Loaded] = []
