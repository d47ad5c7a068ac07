"""A whole evaluation: tasks, lengths, samples, methods, fractions; written line by line, so that it can be resumed.

In: what to run, a folder. Out: `results.jsonl`, `run.json`, `prompts.jsonl`, `reads.jsonl` in it. Per task and length
the full cache answers all samples first: where it is near the floor itself, the task says nothing about methods, and
its rows are gated. Then every method answers from the same prefill.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from farkv.errors import ConfigError, InputError
from farkv.evals.describe import Plan, Variant, describe_run
from farkv.evals.methods import FULL, list_methods
from farkv.evals.row import PROMPTS, READS, RESULTS, RUN, Key, Row, read_rows
from farkv.evals.sample import Sample
from farkv.evals.work import Cell, Job, Loaded, do_job, start_worker
from farkv.files import write_file

# A task where the full cache scores less is gated: guessing one of four letters, or saying one of four values, is no
# answer. Continuations have no floor.
FLOOR = 1 / 3


class Summary(NamedTuple):
    """What a run did: rows now in the folder, those written by this call, gated cells, skipped variants."""

    rows: list[Row]
    written: int
    gated: list[tuple[str, int, float]]
    skipped: list[dict[str, Any]]


def run_eval(plan: Plan, out: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Summary:
    """Run what is not in the folder yet.

    Raises:
        ConfigError: the folder holds a run of another model, filler or seed. CacheStateError: a method read more than
        it may.
    """
    out.mkdir(parents=True, exist_ok=True)
    loaded = Loaded(plan)
    loaded.check_lengths(plan)
    variants = find_variants(plan)
    skipped = loaded.judge.find_skipped(variants)
    variants = [v for v in variants if v not in skipped]
    record = describe_run(plan, loaded.model, skipped)
    check_folder(out, record)
    write_file(out / RUN, (json.dumps(record, indent=1) + "\n").encode())
    with open_workers(plan, loaded) as work:
        return Runner(plan, out, variants, work).run(loaded.cells(plan), on_progress, record["skipped"])


def find_variants(plan: Plan) -> list[Variant]:
    """Return every method at every fraction; the full cache has one, and is not among them."""
    names = [m for m in plan.methods if m != FULL]
    for name in names:
        if name not in list_methods():
            raise ConfigError(f"--methods: expected some of {', '.join(list_methods())}, got {name!r}")
    return [Variant(name, fraction) for name in names for fraction in plan.fractions]


def check_folder(out: Path, record: dict[str, Any]) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ConfigError: the folder's run differs in what changes its prompts or answers.
    """
    path = out / RUN
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"file {path}: cannot be read ({error}); expected the run of farkv eval") from error
    for name in ("model_sha", "seed", "filler", "form"):
        if old.get(name) != record[name]:
            raise ConfigError(
                f"--out {out}: holds a run with {name} {old.get(name)!r}, this one has {record[name]!r}; "
                "use another folder, or the same options to go on"
            )
    for name in ("tasks", "methods", "fractions", "lengths"):
        record[name] = list(dict.fromkeys([*old.get(name, []), *record[name]]))
    known = {(s["method"], s["fraction"]): s for s in [*old.get("skipped", []), *record["skipped"]]}
    record["skipped"] = list(known.values())


@contextmanager
def open_workers(plan: Plan, loaded: Loaded) -> Iterator[Callable[[list[Job]], Iterator[Any]]]:
    """Yield a function that does jobs, in this process or in several, in order."""
    if plan.workers == 1:
        yield lambda jobs: (do_job(job, loaded) for job in jobs)
        return
    # Spawned, not forked: a fork of a process with torch's threads may hang.
    pool = ProcessPoolExecutor(plan.workers, get_context("spawn"), initializer=start_worker, initargs=(plan,))
    try:
        yield lambda jobs: pool.map(do_job, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


class Runner:
    """Goes through the cells, writes what comes."""

    def __init__(self, plan: Plan, out: Path, variants: list[Variant], work: Callable[[list[Job]], Iterator[Any]]):
        self.plan, self.out, self.variants, self.work = plan, out, variants, work
        path = out / RESULTS
        self.rows = read_rows(path, mend=True) if path.exists() else []
        self.done: dict[Key, Row] = {row.key: row for row in self.rows}
        self.written = 0
        self.gated: list[tuple[str, int, float]] = []

    def run(self, cells: Iterable[Cell], tell: Callable[[int, int], None], skipped: list[dict[str, Any]]) -> Summary:
        """Go through all cells."""
        each, at = 1 + len(self.variants), 0
        total = len(self.plan.tasks) * len(self.plan.lengths) * self.plan.limit * each
        for cell in cells:
            self._write_prompts(cell)
            gated = self._run_full(cell, lambda n, at=at: tell(at + n, total))
            at += len(cell.samples)
            if not (gated and self.plan.skip_gated):
                self._run_others(cell, gated, lambda n, at=at: tell(at + n, total))
            at += len(cell.samples) * len(self.variants)
            tell(at, total)
        return Summary(self.rows, self.written, self.gated, skipped)

    def _run_full(self, cell: Cell, tell: Callable[[int], None]) -> bool:
        """Let the full cache answer all samples; its rows are written when the gate is known. Return the gate."""
        have = {s.seed: self._find(Variant(FULL, 1.0), s) for s in cell.samples}
        missing = [s for s in cell.samples if have[s.seed] is None]
        found: list[Row] = []
        for row in self.work([Job(s, (), None, traced=False) for s in missing]):
            found.append(row[0][0])
            tell(len(cell.samples) - len(missing) + len(found))
        old = [row for row in have.values() if row is not None]
        score = statistics.fmean(row.score for row in old + found)
        gated = old[0].gated if old else score < FLOOR and not cell.samples[0].continuation
        if gated:
            self.gated.append((cell.task, cell.length, score))
        for row in found:
            self._write(replace(row, gated=gated))
        return gated

    def _run_others(self, cell: Cell, gated: bool, tell: Callable[[int], None]) -> None:
        jobs: list[Job] = []
        for n, sample in enumerate(cell.samples):
            missing = tuple(v for v in self.variants if self._find(v, sample) is None)
            if missing:
                full = self._find(Variant(FULL, 1.0), sample)
                jobs.append(Job(sample, missing, full, traced=n < self.plan.trace))
        done = len(cell.samples) * len(self.variants) - sum(len(j.variants) for j in jobs)
        for found in self.work(jobs):
            for row, trace in found:
                self._write(replace(row, gated=gated))
                if trace is not None:
                    self._append(READS, json.dumps(trace))
            done += len(found)
            tell(done)

    def _find(self, variant: Variant, sample: Sample) -> Row | None:
        """Return a row that is there already.

        Raises:
            ConfigError: it is of another prompt.
        """
        row = self.done.get(Key(sample.task, variant.method, variant.fraction, sample.length, sample.seed))
        if row is not None and row.prompt_sha != sample.prompt_sha:
            raise ConfigError(
                f"--out {self.out}: sample {sample.task}/{sample.length}/{sample.seed} was made from another text "
                "(another Python's library?); use another folder"
            )
        return row

    def _write(self, row: Row) -> None:
        self._append(RESULTS, row.to_json())
        self.rows.append(row)
        self.done[row.key] = row
        self.written += 1

    def _append(self, name: str, line: str) -> None:
        with (self.out / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _write_prompts(self, cell: Cell) -> None:
        """Keep the prompts, so that another program can answer the same ones."""
        if not self.plan.save_prompts:
            return
        path = self.out / PROMPTS
        there = {json.loads(line)["prompt_sha"] for line in path.open(encoding="utf-8")} if path.exists() else set()
        for s in cell.samples:
            if s.prompt_sha not in there:
                turns = [t._asdict() for t in s.turns]
                row = {"prompt_sha": s.prompt_sha, **{k: v for k, v in asdict(s).items() if k not in ("turns", "meta")}}
                self._append(PROMPTS, json.dumps({**row, "turns": turns}, ensure_ascii=False))
