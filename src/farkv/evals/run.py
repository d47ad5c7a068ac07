"""A whole evaluation: tasks, lengths, samples, methods, fractions; written line by line, so that it can be resumed.

In: the settings, a folder. Out: `results.jsonl`, `run.json`, `prompts.jsonl`, `reads.jsonl` in it. A sample is read
once; the full cache and then every method answer from that. Where the full cache scores near the floor itself, a task's
scores cannot distinguish methods, and its rows are marked as gated; how near predictions are to the full cache's (`kl`,
`top1`) is measured everywhere.
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
from farkv.evals.describe import EvalPlan, Variant, describe_run
from farkv.evals.methods import FULL, list_methods
from farkv.evals.prompter import Prompter
from farkv.evals.row import MAX_BYTES, PROMPTS, READS, RESULTS, RUN, Key, Row, read_rows, write_rows
from farkv.evals.sample import Sample
from farkv.evals.work import Answered, CellSamples, Loaded, WorkItem, run_item, run_whole, start_worker
from farkv.files import append_line, read_file, saying, write_file
from farkv.names import make_folder
from farkv.quote import quote
from farkv.untrusted import parse_json

# Cells where the full cache scores less are gated: such scores can come from guessing one of four letters, or from one
# of four values. Continuations have no floor.
FLOOR = 1 / 3
# Runs work items; the answers of one come together, items in order.
Work = Callable[[list[WorkItem]], Iterator[Iterable[Answered]]]
# What identifies a skipped variant.
VARIANT = ("method", "fraction")


class Summary(NamedTuple):
    """The result of a run: all rows in the folder, the number written now, gated cells, skipped variants."""

    rows: list[Row]
    written: int
    gated: list[tuple[str, int, float]]
    skipped: list[dict[str, Any]]


def run_eval(
    plan: EvalPlan,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_load: Callable[[int, int | None], None] | None = None,
) -> Summary:
    """Run everything that is not in the folder yet.

    Args:
        on_progress: is told how many answers there are, of how many.
        on_load: as for `load_model`.

    Raises:
        ConfigError: the folder has a run with another model, filler or seed.
        CacheStateError: a method read more than its fraction allows.
    """
    with saying("results folder", out):
        make_folder(out)
    loaded = Loaded(plan, on_load)
    loaded.check_lengths(plan)
    variants = find_variants(plan)
    skipped = loaded.judge.find_skipped(variants)
    variants = [v for v in variants if v not in skipped]
    record = describe_run(plan, loaded, skipped)
    check_folder(out, record)
    write_file(out / RUN, (json.dumps(record, indent=1) + "\n").encode(), "file", private=True)
    with open_workers(plan, loaded) as work:
        return Runner(plan, out, variants, work, loaded.judge.prompter).run(
            loaded.cells(plan), on_progress, record["skipped"]
        )


def find_variants(plan: EvalPlan) -> list[Variant]:
    """Return every method at every fraction, without the full cache."""
    names = [m for m in plan.methods if m != FULL]
    for name in names:
        if name not in list_methods():
            raise ConfigError(f"--methods: expected some of {', '.join(list_methods())}, got {name!r}")
    return [Variant(name, fraction) for name in names for fraction in plan.fractions]


def resume_plan(plan: EvalPlan, out: Path) -> EvalPlan:
    """Return the settings of the run in a folder; processes, device and profile are those asked for now.

    Raises:
        InputError: the folder has no run, or its record is damaged.
    """
    path = out / RUN
    try:
        old = parse_json(read_file(path, MAX_BYTES))
        check_old(old)
        lists: dict[str, Any] = {name: tuple(old[name]) for name in ("tasks", "methods", "fractions", "lengths")}
        same = {name: old[name] for name in ("model", "seed", "filler", "form", "dtype", "limit", "batch")}
        kinds = {"seed": int, "limit": int, "batch": int}
        if wrong := next((n for n, x in same.items() if type(x) is not kinds.get(n, str)), None):
            raise ValueError(f"{wrong}: expected {kinds.get(wrong, str).__name__}")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--resume: {quote(path)}: expected the run of farkv eval ({error!r:.200}); leave --resume out to begin one"
        ) from error
    return plan._replace(**lists, **same)


def check_folder(out: Path, record: dict[str, Any]) -> None:
    """Check that the folder's run, if any, can be continued, and merge its settings into the record.

    Raises:
        ConfigError: the folder's run differs in a setting that changes prompts or answers.
        InputError: its run.json is damaged.
    """
    path = out / RUN
    if not path.exists():
        return
    try:
        old = parse_json(read_file(path, MAX_BYTES))
        check_old(old)
    except (OSError, ValueError) as error:
        raise InputError(
            f"file {quote(path)}: cannot be read ({error}); expected the run of farkv eval; use another folder"
        ) from error
    for name in ("model_sha", "seed", "filler", "form"):
        if old.get(name) != record[name]:
            raise ConfigError(
                f"--out {quote(out)}: holds a run with {name} {old.get(name)!r}, this one has {record[name]!r}; "
                "use another folder, or the same options to resume it"
            )
    for name in ("tasks", "methods", "fractions", "lengths"):
        record[name] = list(dict.fromkeys([*old.get(name, []), *record[name]]))
    known = {(s["method"], s["fraction"]): s for s in [*old.get("skipped", []), *record["skipped"]]}
    record["skipped"] = list(known.values())


def check_old(old: Any) -> None:
    """Raise ValueError unless a run's record has what is merged into the next one's."""
    if not isinstance(old, dict):
        raise ValueError(f"expected a JSON object, got {type(old).__name__}")
    for name in ("tasks", "methods", "fractions", "lengths", "skipped"):
        kind = dict if name == "skipped" else (str, int, float)
        values = old.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name}: expected a list")
    if not all(isinstance(item.get(key), str | int | float) for item in old.get("skipped", []) for key in VARIANT):
        raise ValueError(f"skipped: expected {' and '.join(VARIANT)} of every variant")


def read_known(path: Path) -> set[str]:
    """Return which prompts a file holds already.

    Raises:
        InputError: a line is damaged.
    """
    try:
        lines = read_file(path, MAX_BYTES).decode("utf-8").split("\n") if path.exists() else []
        return {parse_json(line, half_letters=True)["prompt_sha"] for line in lines if line.strip()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"file {quote(path)}: expected the prompts of farkv eval ({error!r:.200}); delete it, or use another folder"
        ) from error


@contextmanager
def open_workers(plan: EvalPlan, loaded: Loaded) -> Iterator[Work]:
    """Yield a function that runs work items, in this process or in several, and returns results in order."""
    if plan.workers == 1:
        yield lambda items: (run_item(item, loaded) for item in items)
        return
    # Spawned, not forked: forking a process with torch threads may hang.
    pool = ProcessPoolExecutor(plan.workers, get_context("spawn"), initializer=start_worker, initargs=(plan,))
    try:
        yield lambda items: pool.map(run_whole, items)
    finally:
        pool.shutdown(cancel_futures=True)


class Runner:
    """Runs all cells and writes the rows."""

    def __init__(self, plan: EvalPlan, out: Path, variants: list[Variant], work: Work, prompter: Prompter):
        self.plan, self.out, self.variants, self.work, self.prompter = plan, out, variants, work, prompter
        path = out / RESULTS
        self.rows = read_rows(path, mend=True) if path.exists() else []
        self.done: dict[Key, Row] = {row.key: row for row in self.rows}
        self.written = 0
        self.gated: list[tuple[str, int, float]] = []

    def run(
        self, cells: Iterable[CellSamples], tell: Callable[[int, int], None], skipped: list[dict[str, Any]]
    ) -> Summary:
        """Run all cells."""
        each, at = 1 + len(self.variants), 0
        total = len(self.plan.tasks) * len(self.plan.lengths) * self.plan.limit * each
        tell(0, total)
        for cell in cells:
            self._write_prompts(cell)
            self._run_cell(cell, lambda n, at=at: tell(at + n, total))
            self._gate(cell)
            at += len(cell.samples) * each
            tell(at, total)
        return Summary(self.rows, self.written, self.gated, skipped)

    def _run_cell(self, cell: CellSamples, tell: Callable[[int], None]) -> None:
        """Answer what is not there yet; the full cache answers each sample again, to be compared with."""
        items = [item for batch in self._cut(cell.samples) if (item := self._make_item(batch)) is not None]
        missing = sum(len(item.samples) * (1 + len(item.variants)) for item in items)
        done = len(cell.samples) * (1 + len(self.variants)) - missing
        for answered in self.work(items):
            for row, trace in answered:
                if row.key not in self.done:
                    self._write(row)
                if trace is not None:
                    self._append(READS, json.dumps(trace))
                done += 1
                tell(done)

    def _cut(self, samples: list[Sample]) -> Iterator[list[Sample]]:
        """Yield the batches of a cell: traced samples alone, the others together as far as they have as many turns."""
        alone, rest = samples[: self.plan.trace], samples[self.plan.trace :]
        yield from ([sample] for sample in alone)
        same = len({(len(s.turns), bool(s.continuation), s.n_written) for s in rest}) <= 1
        size = self.plan.batch if same else 1
        yield from (rest[i : i + size] for i in range(0, len(rest), size))

    def _make_item(self, batch: list[Sample]) -> WorkItem | None:
        """Return what is missing of a batch; None if nothing is."""
        full = [self._find(Variant(FULL, 1.0), sample) for sample in batch]
        missing = tuple(v for v in self.variants if any(self._find(v, sample) is None for sample in batch))
        if not missing and all(full):
            return None
        known = [row.turns[0].get("written") for row in full if row is not None and batch[0].n_written]
        written = [ids for ids in known if ids] if len(known) == len(batch) else []
        traced = batch[0].seed - self.plan.seed < self.plan.trace
        return WorkItem(batch, missing, written if len(written) == len(batch) else None, traced)

    def _gate(self, cell: CellSamples) -> None:
        """Mark the scores of a cell that the full cache itself fails; its rows are written anew."""
        if cell.samples[0].continuation or cell.samples[0].n_written:
            return
        full = [row for s in cell.samples if (row := self._find(Variant(FULL, 1.0), s)) is not None]
        score = statistics.fmean(row.score for row in full)
        gated = score < FLOOR
        if gated:
            self.gated.append((cell.task, cell.length, score))
        place = (cell.task, cell.length)
        if any(row.gated is not gated for row in self.rows if (row.task, row.length) == place):
            self.rows = [replace(r, gated=gated) if (r.task, r.length) == place else r for r in self.rows]
            self.done = {row.key: row for row in self.rows}
            write_rows(self.out / RESULTS, self.rows)

    def _find(self, variant: Variant, sample: Sample) -> Row | None:
        """Return the existing row of a variant and sample, if any.

        Raises:
            ConfigError: the row has another prompt.
        """
        row = self.done.get(Key(sample.task, variant.method, variant.fraction, sample.length, sample.seed))
        if row is not None and row.prompt_sha != sample.prompt_sha:
            raise ConfigError(
                f"--out {quote(self.out)}: sample {sample.task}/{sample.length}/{sample.seed} has another prompt than "
                "before (another Python version's library?); use another folder"
            )
        return row

    def _write(self, row: Row) -> None:
        self._append(RESULTS, row.to_json())
        self.rows.append(row)
        self.done[row.key] = row
        self.written += 1

    def _append(self, name: str, line: str) -> None:
        with saying("file", self.out / name):
            append_line(self.out / name, line)

    def _write_prompts(self, cell: CellSamples) -> None:
        """Write the prompts, if requested, so that other programs can answer them."""
        if not self.plan.save_prompts:
            return
        path = self.out / PROMPTS
        known = read_known(path)
        for s in cell.samples:
            if s.prompt_sha not in known:
                row = {"prompt_sha": s.prompt_sha, **{k: v for k, v in asdict(s).items() if k not in ("turns", "meta")}}
                row |= {"turns": [t._asdict() for t in s.turns], "tokens": self.prompter.list_tokens(s)}
                self._append(PROMPTS, json.dumps(row, ensure_ascii=False))
