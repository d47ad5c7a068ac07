"""The published evaluation: every method, fraction, task and length, on the demo model.

    python benchmarks/demo_eval.py                 # runs what is not there yet, 2 processes; then farkv report
    python benchmarks/demo_eval.py --limit-scale 2 # twice the samples

In: `farkv eval`. Out: `benchmarks/results/eval/`, and the tables of README and docs/evaluation.md (`tables.py`).
Tasks whose answers are long get fewer samples: a step costs the same whatever it says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from rows import RESULTS
from runs import make_parser

from farkv.evals.cells import Study, study_rows
from farkv.evals.show import list_notes, percent, to_grid, to_markdown
from farkv.evals.tables import make_table, read_results

OUT = RESULTS / "eval" / "demo"
METHODS = (
    "infinigen", "infinigen-paper", "pages", "lowbit", "oracle", "window", "random", "xkv", "xkv-paper", "snapkv",
    "pyramidkv", "h2o",
)  # fmt: skip
FRACTIONS = (0.02, 0.05, 0.1, 0.2)
LENGTHS = (2048, 8192)
# Samples per task, at each of the lengths. Summing the attention of all queries (H2O) takes half of the time at 8 K.
LIMITS = {"niah_multikey": (16, 10), "niah_single": (8, 4), "multiturn": (6, 4), "ppl": (4, 3)}
LIMITS |= dict.fromkeys(("niah_multivalue", "niah_multiquery", "qa"), (6, 4))
LIMITS |= dict.fromkeys(("vt", "cwe", "fwe", "longgen", "extraction"), (4, 3))
# Whose reads are mapped: one sample of it, every method.
TRACED = ("niah_multikey", 2048)


def run(scale: float, workers: int, threads: int) -> None:
    """Run every task with its own number of samples; what is there already is left."""
    cells = [(t, length, n) for t, limits in LIMITS.items() for length, n in zip(LENGTHS, limits, strict=True)]
    for task, length, limit in cells:
        command = [
            sys.executable, "-m", "farkv.cli", "eval", "--model", "demo", "--tasks", task,
            "--methods", ",".join(METHODS), "--fractions", ",".join(map(str, FRACTIONS)),
            "--lengths", str(length), "--limit", str(round(limit * scale)), "--workers", str(workers),
            "--threads", str(threads), "--trace", str(int((task, length) == TRACED)),
            "--save-prompts", "--out", str(OUT),
        ]  # fmt: skip
        subprocess.run(command, check=True)


def name_command() -> None:
    """Say in the record how the whole was made, in place of the last task's own command."""
    path = OUT / "run.json"
    few, many = min(min(n) for n in LIMITS.values()), max(max(n) for n in LIMITS.values())
    record = json.loads(path.read_text()) | {"command": "python benchmarks/demo_eval.py", "limit": f"{few} to {many}"}
    path.write_text(json.dumps(record, indent=1) + "\n")


@cache
def study(folder: Path) -> Study:
    """Return the rows of the published run."""
    return study_rows(read_results(folder))


def format_grids(folder: Path = OUT) -> str:
    """Return one table per fraction: methods down; all, each length and each task across."""
    found = study(folder)
    parts = []
    for fraction in FRACTIONS:
        parts += [f"**{percent(fraction, 0)} of the KV bytes read per step**", to_grid(found, fraction)]
    return "\n\n".join([*(p.strip() for p in parts), *list_notes(make_table(found))])


def format_methods(folder: Path = OUT) -> str:
    """Return all methods and fractions over all tasks, with intervals."""
    return to_markdown(make_table(study(folder))).strip()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--limit-scale", type=float, default=1.0, help="times the samples of every task")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    run(args.limit_scale, args.workers, args.threads)
    name_command()
    print(format_methods())
    subprocess.run([sys.executable, "-m", "farkv.cli", "report", str(OUT), "-o", str(OUT / "report.html")], check=True)


if __name__ == "__main__":
    main()
