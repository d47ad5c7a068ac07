"""What was run, what is not compared and why, and how the numbers are to be read.

In: `run.json`, tables, rows. Out: HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from farkv.errors import InputError
from farkv.evals.cells import FULL, OURS, Setting, Study
from farkv.evals.report.element import Html, el, join
from farkv.evals.report.grids import draw_box
from farkv.evals.report.words import and_join, say_methods
from farkv.evals.row import RUN, Row
from farkv.evals.show import fraction_text, length_text, name_setting, percent
from farkv.evals.tables import Table

# Samples shown of those that ours lost, and characters of an answer.
MOST_SHOWN, MOST_CHARACTERS = 12, 300
NOTES = (
    ("Score", "0 to 1 per sample: the share of the expected answers that the answer has; for ppl the share of the "
     "text's next tokens that are ranked first. A mean is over cells (a task at a length), each of the same weight."),
    ("Intervals", "Percentile bootstrap of 2000 resamples, drawn inside each cell. A difference is taken sample by "
     "sample, between methods that answered the same prompt. Where all samples are equal an interval has no width: "
     "the number of samples says how little that proves."),
    ("best, ≈", "best: the highest mean of a fraction, the oracle and the full cache aside. ≈: the paired interval of "
     "its difference to the best has zero in it. Dozens of comparisons are made here: one in forty is lucky."),
    ("read, index", "KV bytes that a decode step attends to, and bytes of the index that it scores to choose them, "
     "each over the KV bytes of all layers. Methods are compared at read + index, as in the first picture."),
    ("kept, resident", "KV bytes that are still somewhere, and those in the memory that attention computes from. "
     "What a method evicts is gone for the later turns of multiturn."),
    ("Sees the query", "Solid line, full marker: records are chosen anew at every step. Dashed line, hollow marker: "
     "what stays was chosen before the question was known."),
    ("Proof", "sparse: fewer bytes than the full cache holds were read at decode steps, counted and asserted. "
     "everything: the full cache. every key: a bound that reads all keys to choose, so it saves nothing; it is drawn "
     "where it attends. unproven: nothing was decoded through the cache, or the bytes could not be counted."),
    ("Speed", "Tokens per second on the machine above, whatever else it did at that time; a method of which a native "
     "kernel is missing is slow for that reason. Use farkv bench to compare speed."),
)  # fmt: skip


def load_run(folder: Path) -> dict[str, Any]:
    """Return run.json; nothing where there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"file {path}: expected what farkv eval wrote ({error}); run farkv eval again") from error
    if not isinstance(run, dict):
        raise InputError(f"file {path}: expected a JSON object, got {type(run).__name__}; run farkv eval again")
    return run


def draw_run(run: dict[str, Any], study: Study) -> Html:
    """Return what was run: model, command, versions, machine, seeds."""
    machine = run.get("machine") if isinstance(run.get("machine"), dict) else {}
    versions = run.get("versions") if isinstance(run.get("versions"), dict) else {}
    cells = [*study.cells, *study.gated]
    facts: list[tuple[str, object]] = [
        ("model", join_known(run.get("model"), run.get("model_sha"))),
        ("command", el("code", run["command"]) if run.get("command") else ""),
        ("tasks", ", ".join(dict.fromkeys(cell.task for cell in cells))),
        ("lengths", and_join(length_text(n) for n in sorted({cell.length for cell in cells})) + " tokens"),
        ("methods", say_methods([s for s in study.settings if not s.is_full])),
        ("samples", f"{run.get('limit', '?')} per task and length, seeds from {run.get('seed', '?')}"),
        ("filler", run.get("filler") or ""),
        ("machine", describe_machine(machine or {}, run.get("threads"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in (versions or {}).items())),
    ]
    rows = [join([el("dt", name), el("dd", value)]) for name, value in facts if value]
    return el("dl", *rows, class_="facts")


def join_known(*values: object) -> str:
    """Return what is known of some values, with commas."""
    return ", ".join(str(value) for value in values if value)


def describe_machine(machine: dict[str, Any], threads: object) -> str:
    """Return the machine in a line."""
    cores, memory = machine.get("cores"), machine.get("memory_bytes")
    size = f"{memory / 2**30:.0f} GiB" if isinstance(memory, (int, float)) else None
    return join_known(
        machine.get("processor"), f"{cores} cores" if cores else None, size, f"{threads} threads" if threads else None
    )


def draw_left_out(table: Table, study: Study, run: dict[str, Any]) -> Html:
    """Return what is not compared: gated cells, pairs that were skipped, settings that answered too little."""
    parts: list[Html] = []
    if table.gated:
        rows = [[g.task, length_text(g.length), percent(g.full), str(g.n)] for g in table.gated]
        parts.append(el("h3", "Gated"))
        parts.append(el("p", "The full cache itself is near the floor here: what a method lost cannot be seen."))
        parts.append(draw_plain(("task", "length", "full cache", "n"), rows, "Gated cells"))
    if skipped := list_skipped(run):
        parts.append(el("h3", "Skipped"))
        parts.append(draw_plain(("method", "fraction", "why"), skipped, "Skipped methods and fractions"))
    if table.absent:
        names = ", ".join(name_setting(s) for s in table.absent)
        said = (
            f"Too few cells were answered by: {names}. Where they answered a whole length or task, its column has them."
        )
        parts.append(el("p", said))
    if study.dropped:
        said = f"{study.dropped} rows are left out: no score, or not the prompt that the full cache answered."
        parts.append(el("p", said))
    return join(parts) if parts else el("p", "Nothing: every method answered every cell.")


def list_skipped(run: dict[str, Any]) -> list[list[str]]:
    """Return method, fraction and reason of what the run skipped."""
    found = []
    skipped = run.get("skipped")
    for item in skipped if isinstance(skipped, list) else []:
        if isinstance(item, dict):
            fraction = item.get("fraction")
            shown = fraction_text(fraction) if isinstance(fraction, (int, float)) else "–"
            found.append([str(item.get("method", "?")), shown, str(item.get("why", ""))])
    return found


def draw_plain(head: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> Html:
    """Return a table of words."""
    body = [el("tr", *(el("td", text, class_="words") for text in row)) for row in rows]
    heads = (el("th", text, scope="col", class_="words") for text in head)
    return draw_box(el("table", el("thead", el("tr", *heads)), el("tbody", *body), class_="plain"), name)


def draw_notes() -> Html:
    """Return how to read the numbers."""
    return el("dl", *(join([el("dt", name), el("dd", said)]) for name, said in NOTES), class_="facts")


def draw_lost(rows: Iterable[Row], fraction: float, method: str = OURS) -> Html | None:
    """Return samples that the full cache answered better than a method, with both answers; None where there is none."""
    subject = Setting(method, fraction)
    full = {(row.task, row.length, row.seed): row for row in rows if row.method == FULL and not row.gated}
    lost = []
    for row in rows:
        base = full.get((row.task, row.length, row.seed))
        if (row.method, row.fraction) == subject and base is not None and is_lower(row.score, base.score):
            lost.append((base.score - row.score, base, row))
    if not lost:
        return None
    lost.sort(key=lambda found: -found[0])
    shown = []
    for _, base, row in lost[:MOST_SHOWN]:
        where = f"{row.task} {length_text(row.length)}, sample {row.seed}"
        expected = ", ".join(str(x) for x in row.expected) if isinstance(row.expected, list) else str(row.expected)
        scores = f"{percent(row.score, 0)} / {percent(base.score, 0)}"
        shown.append([where, scores, *(cut(answer) for answer in (expected, base.answer, row.answer))])
    said = f"{len(lost)} samples where {name_setting(subject)} scores below the full cache"
    said += f"; the {MOST_SHOWN} that lost most." if len(lost) > MOST_SHOWN else "."
    head = ("sample", "score / full", "expected", "the full cache", method)
    return join([el("p", said), draw_plain(head, shown, "Answers that were lost")])


def is_lower(a: object, b: object) -> bool:
    """Return whether two scores are numbers and the first is lower."""
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a < b


def cut(answer: object) -> str:
    """Return the beginning of an answer."""
    said = str(answer)
    return said if len(said) <= MOST_CHARACTERS else said[:MOST_CHARACTERS] + " …"
