"""One process of an evaluation: it loads the model once, then answers samples one after another."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farkv.errors import ConfigError, InputError
from farkv.evals.describe import EvalPlan, Variant
from farkv.evals.judge import Judge
from farkv.evals.prompter import choose_form
from farkv.evals.row import Row
from farkv.evals.sample import Sample
from farkv.evals.saved import SavedPrompts
from farkv.evals.text import Maker
from farkv.hf.load import load_model, quiet_libraries

# A row, and the trace of its reads if there is one.
Answered = tuple[Row, dict[str, Any] | None]


class WorkItem(NamedTuple):
    """Samples of a cell, answered as one batch, and the variants that answer them after the full cache.

    written: what that wrote before, if known.
    """

    samples: list[Sample]
    variants: tuple[Variant, ...]
    written: list[list[int]] | None
    traced: bool


class CellSamples(NamedTuple):
    """The samples of a cell: one task at one length."""

    task: str
    length: int
    samples: list[Sample]


# What lies around a task's lines, in words and in code.
FILLER = ("mixed", "code")


class Loaded:
    """A loaded model, with its judge and its samples."""

    def __init__(self, plan: EvalPlan, on_load: Callable[[int, int | None], None] | None = None):
        quiet_libraries()
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        self.model, self.tokenizer = load_model(plan.model, dtype=plan.dtype, device=plan.device, on_load=on_load)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"tokenizer {type(self.tokenizer).__name__}: expected a fast tokenizer, which gives token offsets; "
                "use a model that has one"
            )
        self.form = choose_form(plan.form, plan.model, self.tokenizer, self.model.num_parameters())
        self.judge = Judge(self.model, self.tokenizer, self.form, False if plan.profile == "none" else plan.profile)
        self.maker = Maker(self.tokenizer, plan.filler or FILLER[self.form == "code"], in_code=self.form == "code")

    def check_lengths(self, plan: EvalPlan) -> None:
        """Check that the model has enough positions for all lengths.

        Raises:
            ConfigError: a length exceeds them.
        """
        most = getattr(self.model.config, "max_position_embeddings", None)
        too_long = [n for n in plan.lengths if most is not None and n > most]
        if too_long:
            raise ConfigError(f"--lengths: {plan.model} has {most} positions, got {too_long[0]}; use shorter lengths")

    def cells(self, plan: EvalPlan) -> Iterator[CellSamples]:
        """Make the samples, one task and length at a time; tasks with a colon are files (`ruler:PATH`).

        Prompts that were saved are taken from their file.
        """
        saved = None if plan.prompts is None else SavedPrompts(Path(plan.prompts))
        for task in plan.tasks:
            if ":" in task:
                yield from self.load_cells(task, plan)
                continue
            for length in plan.lengths:
                seeds = range(plan.seed, plan.seed + plan.limit)
                if saved is not None:
                    yield CellSamples(task, length, saved.find(task, length, seeds))
                else:
                    yield CellSamples(task, length, [self.maker.make(task, length, seed) for seed in seeds])

    def load_cells(self, spec: str, plan: EvalPlan) -> list[CellSamples]:
        """Return the cells of a public data set."""
        # Imported only when needed.
        from farkv.evals.public import load_public

        grouped: dict[tuple[str, int], list[Sample]] = {}
        for sample in load_public(spec, self.tokenizer, plan.lengths, plan.limit, plan.seed):
            grouped.setdefault((sample.task, sample.length), []).append(sample)
        return [CellSamples(*key, list(islice(samples, plan.limit))) for key, samples in grouped.items()]


def run_item(item: WorkItem, loaded: Loaded) -> Iterator[Answered]:
    """Answer with the full cache, then with the item's variants; rows come as they are made."""
    yield from loaded.judge.judge(item.samples, list(item.variants), written=item.written, traced=item.traced)


def run_whole(item: WorkItem) -> list[Answered]:
    """Answer in a worker process, and return all rows."""
    return list(run_item(item, _worker[0]))


def start_worker(plan: EvalPlan) -> None:
    """Load the model in a worker process."""
    # Ctrl-C reaches all processes: the one that started these says so, and they go without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # So does what is said of a model that is loaded.
    logging.getLogger("farkv").setLevel(logging.ERROR)
    _worker.append(Loaded(plan))


# The model of a worker process.
_worker: list[Loaded] = []
