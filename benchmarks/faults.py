"""What comes of a fault? Real ones, injected at random moments: a right answer, a refusal in words, or a wrong answer.

    python benchmarks/faults.py --runs 20 --out benchmarks/results/faults.jsonl

In: a tiny random model, a text, its saved session. Out: a JSON line per fault with the runs that gave the right answer,
a farkv error, or anything else; a table at the end. Every run ends with a check that what was there before still
answers right; a run that fails it counts as wrong. Exits 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from fault_kinds import FAULTS
from fault_stage import Stage


@torch.no_grad()
def run_fault(stage: Stage, name: str, seed: int) -> str:
    """Inject one fault; return "correct", "refused", or what else came of it."""
    stage.turn(seed)
    try:
        outcome = FAULTS[name](stage)
    except Exception as error:
        traceback.print_exc()
        outcome = f"other: {type(error).__name__}"
    after = stage.judge("session", lambda: stage.answer("session"))
    return outcome if after == "correct" else f"lost: {after} after {outcome}"


def format_table(path: Path) -> str:
    """Return one Markdown row per fault."""
    lines = [
        "| fault | runs | right answer | refused in words | wrong answer or other error |",
        "|---|---|---|---|---|",
    ]
    for row in (json.loads(line) for line in path.read_text().splitlines()):
        name = row["fault"].replace("_", " ")
        lines.append(f"| {name} | {row['runs']} | {row['correct']} | {row['refused']} | {row['wrong']} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=20, type=int)
    parser.add_argument("--faults", default=",".join(FAULTS), help="names, by commas")
    parser.add_argument("--out", default="benchmarks/results/faults.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        # Others must be able to reach what they may not write.
        os.chmod(name, 0o755)
        stage = Stage(Path(name), 0)
        for fault in args.faults.split(","):
            said = [run_fault(stage, fault, seed) for seed in range(args.runs)]
            good = {kind: said.count(kind) for kind in ("correct", "refused")}
            other = sorted(set(said) - set(good))
            rows.append(dict(fault=fault, runs=args.runs, **good, wrong=args.runs - sum(good.values()), other=other))
            print(json.dumps(rows[-1]), file=sys.stderr)
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(format_table(Path(args.out)))
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
