"""The facts about a run, what was skipped, and the lost answers.

In: `run.json`, rows. Out: texts for `page.html`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from farkv.errors import InputError
from farkv.evals.cells import FULL, Setting, Study, as_float
from farkv.evals.report.words import and_join, list_methods
from farkv.evals.row import MAX_BYTES, RUN, Row
from farkv.evals.show import fraction_text, length_text, percent
from farkv.files import read_file
from farkv.quote import quote
from farkv.untrusted import parse_json

# Maximum characters of an answer that are shown.
MOST_CHARACTERS = 300


def load_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json; empty if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        run = parse_json(read_file(path, MAX_BYTES))
    except (ValueError, OSError) as error:
        raise InputError(f"file {quote(path)}: expected what farkv eval wrote ({error}); run it again") from error
    if not isinstance(run, dict):
        raise InputError(f"file {quote(path)}: expected a JSON object, got {type(run).__name__}; run farkv eval again")
    return run


def list_facts(run: dict[str, Any], study: Study) -> list[tuple[str, str]]:
    """Return the facts about a run: model, command, versions, machine, seeds; unknown ones are left out."""
    machine, versions = (run[key] if isinstance(run.get(key), dict) else {} for key in ("machine", "versions"))
    cores, memory, threads = machine.get("cores"), machine.get("memory_bytes"), run.get("threads")
    computer = (
        machine.get("processor"),
        cores and f"{cores} cores",
        f"{memory / 2**30:.0f} GiB" if isinstance(memory, (int, float)) else "",
        threads and f"{threads} threads",
    )
    cells = [*study.cells, *study.gated]
    facts = [
        ("model", join_known(run.get("model"), run.get("model_sha"))),
        ("command", join_known(run.get("command"))),
        ("tasks", ", ".join(dict.fromkeys(cell.task for cell in cells))),
        ("lengths", and_join(length_text(n) for n in sorted({cell.length for cell in cells})) + " tokens"),
        ("methods", list_methods([s for s in study.settings if not s.is_full])),
        ("samples", f"{run.get('limit', '?')} per task and length, seeds from {run.get('seed', '?')}"),
        ("filler", join_known(run.get("filler"))),
        ("machine", join_known(*computer)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, text) for name, text in facts if text]


def join_known(*values: object) -> str:
    """Join the known values with commas."""
    return ", ".join(str(value) for value in values if value)


def list_skipped(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (method, fraction, reason) of the skipped variants."""
    skipped = run.get("skipped")
    found = []
    for item in skipped if isinstance(skipped, list) else []:
        if isinstance(item, dict):
            fraction = item.get("fraction")
            shown = fraction_text(fraction) if isinstance(fraction, (int, float)) else "–"
            found.append((str(item.get("method", "?")), shown, str(item.get("why", ""))))
    return found


def list_lost(rows: Iterable[Row], subject: Setting) -> list[list[str]]:
    """Return the samples that the full cache answered better than a setting, the largest loss first.

    Returns:
        Sample, both scores, the expected answer, the full cache's answer and the setting's answer.
    """
    rows = list(rows)
    full = {(row.task, row.length, row.seed): row for row in rows if row.method == FULL and not row.gated}
    found = []
    for row in rows:
        base = full.get((row.task, row.length, row.seed))
        if (row.method, row.fraction) != subject or base is None:
            continue
        lost = as_float(base.score) - as_float(row.score)
        if lost > 0:
            where = f"{row.task} {length_text(row.length)}, sample {row.seed}"
            expected = ", ".join(map(str, row.expected)) if isinstance(row.expected, list) else str(row.expected)
            scores = f"{percent(row.score, 0)} / {percent(base.score, 0)}"
            found.append((lost, [where, scores, *map(cut, (expected, base.answer, row.answer))]))
    return [texts for _, texts in sorted(found, key=lambda sample: -sample[0])]


def cut(answer: object) -> str:
    """Return the beginning of an answer."""
    text = str(answer)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
