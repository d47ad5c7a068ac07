"""`farkv eval`: compare the quality of methods on your model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farkv.cli.interrupted import Interrupted
from farkv.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, ProfileOption
from farkv.cli.terminal import err, say
from farkv.config import check_fraction
from farkv.errors import ConfigError, InputError
from farkv.quote import quote
from farkv.show import show_phases

if TYPE_CHECKING:
    from farkv.evals.row import Row
    from farkv.evals.run import Summary

# Per form: what is run where nothing is named.
SOME = "niah_single_2,niah_multikey_2,niah_multiquery,qa_1,orders,ppl"
SOME_IN_CODE = "niah_multikey,niah_multiquery,qa,extraction,multiturn,ppl"
METHODS = "infinigen,oracle,window,random"


def evaluate(
    model: ModelOption = "demo",
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated; see above. Or a file: ruler:PATH. Default: a few of them.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; see above. The full cache is always run.")] = METHODS,
    fractions: Annotated[str, typer.Option(help="Caps, comma-separated: 0.02,0.1.")] = "0.05,0.1",
    lengths: Annotated[
        str, typer.Option(help="Tokens of text, question and answer together, comma-separated: 2048,8K.")
    ] = "2048",
    limit: Annotated[int, typer.Option(min=1, help="Samples per task and length.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample; the others count up from it.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Results folder; resumes a run found there.")] = Path("eval"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, by its own settings.")] = False,
    filler: Annotated[
        str | None,
        typer.Option(help="Filler text: mixed, code, manuals, licences, prose. Default: mixed; in code: code."),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="Prompts: code (the demo model's), completion, chat, prefix (the answer is begun), or auto: chat "
            "where there is a template, prefix below 2 billion parameters, completion without a template."
        ),
    ] = "auto",
    trace: Annotated[int, typer.Option(min=0, help="Samples per task and length whose reads are traced.")] = 1,
    save_prompts: Annotated[
        bool, typer.Option("--save-prompts", help="Also write the prompts, so that other programs can answer them.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Ask the prompts of this file, which --save-prompts wrote, perhaps on another machine."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples answered together; uses their KV caches' memory several times.")
    ] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes; each loads the model.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads per process. Default: torch's setting.")
    ] = None,
    profile: ProfileOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Compare methods on long-context tasks, using the real decode path.

    The text is prefilled once; every method then answers from the same keys
    and values, with the question fed token by token. The run stops if a
    method reads more than its fraction, or as much as the full cache. Right
    answers are fed, so KL and top-1 to the full cache are measured on every
    task; scores are of the methods' own answers. Results are JSON lines; an
    interrupted run can be resumed. Report: farkv report DIR

    [bold]Tasks[/bold]

      in words, RULER's thirteen: niah_single_1, niah_single_2, niah_single_3,
      niah_multikey_1, niah_multikey_2, niah_multikey_3, niah_multivalue,
      niah_multiquery, vt, cwe, fwe, qa_1, qa_2

      and: extraction, orders (four turns, every order), longgen, ppl

      in code (--form code): niah_single, niah_multikey, niah_multivalue,
      niah_multiquery, vt, cwe, fwe, qa, extraction, multiturn, longgen, ppl

    [bold]Methods[/bold]

      select records at every step: infinigen, infinigen-top (nothing drawn),
      infinigen-half (half the index), infinigen-vary (reads that vary from head
      to head), infinigen-far, infinigen-far-attn (one layer ahead; the paper's
      source), infinigen-ahead, infinigen-ahead-attn (the same without top-up);
      infinigen-steps, infinigen-far-steps, infinigen-far-attn-steps,
      infinigen-ahead-steps, infinigen-ahead-attn-steps (an index in even
      steps); infinigen-plan,
      infinigen-paper, pages (Quest), lowbit, window, random, oracle, indexer
      (of models that have one)

      evict records after the text: xkv, xkv-uniform, xkv-pyramid, xkv-plan,
      xkv-paper, snapkv, pyramidkv, h2o; NAME-aware: after the question

    [bold]Examples[/bold]

      farkv eval --model demo --tasks niah_multikey,ppl --limit 5 --out eval

      farkv eval --out eval --resume

      farkv eval -m Qwen/Qwen3-8B --tasks orders,vt --lengths 8K,32K

      farkv eval -m ./my-model --tasks ruler:validation.jsonl --lengths 32K
    """
    from farkv.bench.shapes import parse_contexts
    from farkv.evals.describe import EvalPlan
    from farkv.evals.prompter import check_form
    from farkv.evals.run import Summary, resume_plan, run_eval

    check_form(form)

    in_code = form == "code" or (form == "auto" and model == "demo")
    tasks = tasks if tasks is not None else SOME_IN_CODE if in_code else SOME
    plan = EvalPlan(
        model, split(tasks, "--tasks"), split(methods, "--methods"), parse_fractions(fractions),
        tuple(parse_contexts(lengths, "--lengths")), limit, seed, filler, form, trace, workers, threads,
        dtype, device, profile, save_prompts, batch, None if prompts is None else str(prompts),
    )  # fmt: skip
    if resume:
        plan = resume_plan(plan, out)
    # Otherwise each worker's tokenizer prints a warning over the progress bar.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    n_before = len(read_kept(out))
    try:
        with show_phases(err, quiet=as_json) as phases:
            summary = run_eval(plan, out, phases.begin("eval"), phases.begin("loading", in_bytes=True))
    except KeyboardInterrupt as stop:
        rows = read_kept(out)
        if rows:
            finish(Summary(rows, len(rows) - n_before, [], []), out, as_json=as_json)
        raise Interrupted(
            f"with {len(rows)} rows in {quote(out)}; go on: farkv eval --out {quote(out)} --resume"
        ) from stop
    finish(summary, out, as_json=as_json)


def read_kept(out: Path) -> list[Row]:
    """Return the rows that a folder of results has; none where there is no such file, or no one can read it yet."""
    from farkv.evals.row import RESULTS, read_rows

    path = out / RESULTS
    try:
        return read_rows(path, mend=True) if path.exists() else []
    except (OSError, InputError):
        # The run itself says what is wrong with it.
        return []


def finish(summary: Summary, out: Path, *, as_json: bool) -> None:
    """Print the tables, and one object where that is asked for."""
    show_summary(summary, out)
    if as_json:
        typer.echo(json.dumps(describe(summary, out)))


def describe(summary: Summary, out: Path) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    from farkv.evals.closeness import measure_fractions
    from farkv.evals.near_tables import to_json
    from farkv.evals.tables import make_table

    gated = [{"task": t, "length": n, "full_score": s} for t, n, s in summary.gated]
    table = make_table(summary.rows)
    return {
        "out": str(out), "rows": len(summary.rows), "written": summary.written, "gated": gated,
        "skipped": summary.skipped, "near": to_json(measure_fractions(summary.rows)), "table": table.to_dict(),
    }  # fmt: skip


def show_summary(summary: Summary, out: Path) -> None:
    """Print the tables, and list what was gated or skipped."""
    from farkv.evals.closeness import measure_fractions
    from farkv.evals.near_tables import draw_near
    from farkv.evals.show import draw_table
    from farkv.evals.tables import make_table

    err.print(draw_near(measure_fractions(summary.rows)))
    err.print(draw_table(make_table(summary.rows)))
    for task, length, score in summary.gated:
        say(f"gated: {task} at {length}: the full cache itself scores only {score:.0%}")
    for skipped in summary.skipped:
        say(f"skipped: {skipped['method']} at {skipped['fraction']}: {skipped['why']}")
    say(f"{summary.written} rows written, {len(summary.rows)} in {quote(out)}; farkv report {quote(out)}")


def split(text: str, option: str) -> tuple[str, ...]:
    """Split a comma-separated list, without duplicates.

    Raises:
        ConfigError: the list is empty.
    """
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ConfigError(f"{option}: expected comma-separated names, got {text!r}")
    return parts


def parse_fractions(text: str) -> tuple[float, ...]:
    """Parse a comma-separated list of caps.

    Raises:
        ConfigError: one is not a number in (0, 1].
    """
    try:
        found = tuple(float(part) for part in split(text, "--fractions"))
    except ValueError as error:
        raise ConfigError(f"--fractions: expected comma-separated numbers, got {text!r}") from error
    for fraction in found:
        check_fraction(fraction)
    return found
