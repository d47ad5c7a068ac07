"""The published evaluation: how near every method stays to the full cache, on a real model, at how many bytes.

    python benchmarks/evidence.py --model smollm2            # what is not there yet; goes on where it stopped
    python benchmarks/evidence.py --model smollm2 --quick    # a few tasks and methods
    python benchmarks/evidence.py --model ./folder --only kept --scale 0.5
    python benchmarks/evidence.py --model FILE.gguf
    python benchmarks/evidence.py --model smollm2 --calibrate   # measures a profile first, from texts of its own

In: a name of `benchmarks/real_models.py`, a folder or a GGUF file. Out: rows of `farkv eval` in `runs/evidence/NAME`, a
table on stdout. Published rows are of `--dtype bfloat16 --out benchmarks/results/eval/NAME`; `tables.py` makes their
tables. Filler is of what is installed, so another machine's rows have other prompts and a folder of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from real_models import find_model
from rows import RESULTS
from runs import make_parser

from farkv.calibrate.profile import find_beside
from farkv.evals.closeness import measure_fractions
from farkv.evals.fillers import draw_lines
from farkv.evals.near_tables import write_near
from farkv.evals.row import RESULTS as ROWS
from farkv.evals.row import RUN, Row, read_rows, write_rows
from farkv.evals.show import length_text
from farkv.hf.load import load_model

OUT = RESULTS / "eval"
SINGLES = ("niah_single_1", "niah_single_2", "niah_single_3")
KEYS = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
OTHERS = ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")
MAIN = (
    "infinigen", "infinigen-top", "infinigen-steps", "lowbit", "pages", "oracle", "infinigen-paper", "xkv", "snapkv",
    "pyramidkv", "h2o", "window",
)  # fmt: skip
AHEAD = ("infinigen-far", "infinigen-far-attn", "infinigen-ahead", "infinigen-ahead-attn")
SELECTORS = ("infinigen", "infinigen-top", *AHEAD, "infinigen-steps", *(f"{name}-steps" for name in AHEAD))
INDEXES = ("infinigen-steps", "infinigen-top", "infinigen", "infinigen-half", "infinigen-vary", "lowbit", "oracle")
EVICTORS = ("xkv", "xkv-uniform", "xkv-pyramid", "xkv-plan", "snapkv", "h2o")
AWARE = tuple(f"{name}-aware" for name in EVICTORS)


# Prompts that a profile is measured on, and tokens of each.
CALIBRATION, CALIBRATION_TOKENS = 16, 1024


class Part(NamedTuple):
    """Methods at fractions on tasks: samples per task at each length; `profiled`: with the model's profile."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    limits: dict[int, int]
    batch: int = 8
    profiled: bool = False


# In the order in which they are run.
PARTS: dict[str, Part] = {
    "main": Part(("ppl", *SINGLES, *KEYS, *OTHERS, "orders"), MAIN, (0.02, 0.05, 0.1), {2048: 8, 8192: 4}),
    "ahead": Part(("ppl", "niah_single_2", "niah_multiquery"), SELECTORS, (0.05, 0.1), {2048: 8, 8192: 4}),
    "kept": Part(
        ("ppl", "niah_single_2", "niah_multiquery", "qa_1"), (*EVICTORS, *AWARE), (0.05, 0.1, 0.2, 0.384, 0.5),
        {2048: 8}, profiled=True,
    ),
    "index": Part(("ppl", *SINGLES[:2]), INDEXES, (0.01, 0.02, 0.05, 0.1), {2048: 8}),
    "long": Part(("longgen", "extraction"), ("infinigen", "lowbit", "oracle", "snapkv"), (0.05,), {4096: 2}, 2),
    "longest": Part(("ppl", "niah_single_2"), ("infinigen", "lowbit", "oracle", "snapkv"), (0.02, 0.05), {32768: 2}, 1),
}  # fmt: skip
QUICK = Part(
    ("ppl", "niah_single_2", "niah_multikey_2", "qa_1", "orders"),
    ("infinigen", "lowbit", "pages", "oracle", "snapkv", "window"), (0.05,), {2048: 4}, 4,
)  # fmt: skip


class Limits(NamedTuple):
    """Times the samples of every task, and the longest texts."""

    scale: float
    most_tokens: int


def run_part(part: Part, folder: Path, model: str, profile: str, options: list[str], limits: Limits) -> None:
    """Run every task and length of a part; what is there already is left."""
    for length, limit in part.limits.items():
        if length > limits.most_tokens:
            continue
        for task in part.tasks:
            command = [
                sys.executable, "-m", "farkv.cli", "eval", "--model", model, "--tasks", task,
                "--methods", ",".join(part.methods), "--fractions", ",".join(map(str, part.fractions)),
                "--lengths", str(length), "--limit", str(max(1, round(limit * limits.scale))), "--trace", "0",
                "--batch", str(max(1, part.batch * 2048 // length if length > 2048 else part.batch)),
                "--save-prompts", "--profile", profile if part.profiled else "none", "--out", str(folder), *options,
            ]  # fmt: skip
            subprocess.run(command, check=True)


def calibrate(model: str, profile: Path, dtype: str) -> None:
    """Measure a model's profile, with losses, from texts of the side that calibrates."""
    # The one loader that reads folders, hub ids and GGUF files.
    _, tokenizer = load_model(model, dtype=dtype)

    def count(line: str) -> int:
        return len(tokenizer(line, add_special_tokens=False)["input_ids"])

    texts = ["".join(draw_lines("mixed", CALIBRATION_TOKENS, i, count, calibration=True)) for i in range(CALIBRATION)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as prompts:
        prompts.write("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        prompts.flush()
        command = [
            sys.executable, "-m", "farkv.cli", "profile", "--model", model, "--prompts", prompts.name, "--out",
            str(profile), "--losses", str(CALIBRATION // 4), "--dtype", dtype,
        ]  # fmt: skip
        subprocess.run(command, check=True)


def tidy(folder: Path, command: str) -> None:
    """Write rows and record as they are committed: numbers of six places, no path of a machine, no long answers."""

    def shorten(row: Row) -> Row:
        turns = [{k: round_all(v) for k, v in turn.items() if k not in ("answer", "expected")} for turn in row.turns]
        values = {name: round_all(value) for name, value in row.to_dict().items() if isinstance(value, float)}
        return replace(row, turns=turns, answer=row.answer[:80], expected=row.expected[:8], **values)

    write_rows(folder / ROWS, [shorten(row) for row in read_rows(folder / ROWS)])
    path = folder / RUN
    record = json.loads(path.read_text()) | {"command": command, "model": folder.name, "limit": "by task"}
    path.write_text(json.dumps(record, indent=1) + "\n")


def round_all(value: object) -> object:
    """Round numbers to six places."""
    if isinstance(value, float):
        return round(value, 6)
    return [round_all(x) for x in value] if isinstance(value, list) else value


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="a name of real_models.py, a folder, or a GGUF file")
    parser.add_argument("--quick", action="store_true", help="a few tasks and methods only")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="parts to run; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="times the samples of every task")
    parser.add_argument("--most-tokens", type=int, default=8192, help="longest texts; 32768 where a model has them")
    parser.add_argument("--calibrate", action="store_true", help="measure the profile first")
    parser.add_argument("--profile", type=Path, help="profile file (default: profile.safetensors beside the model)")
    parser.add_argument("--prompts", type=Path, help="ask the prompts of this file, which an earlier run saved")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="results folder (default: runs/evidence/NAME)")
    args = parser.parse_args()
    name, model = find_model(args.model)
    folder = args.out or Path("runs/evidence", name)
    profile = args.profile or find_beside(model)
    if args.calibrate:
        calibrate(model, profile, args.dtype)
    measured = str(profile) if profile.is_file() else "none"
    options = ["--threads", str(args.threads), "--dtype", args.dtype, "--device", args.device]
    options += ["--prompts", str(args.prompts)] if args.prompts else []
    parts = {"quick": QUICK} if args.quick else {n: p for n, p in PARTS.items() if not args.only or n in args.only}
    for part in parts.values():
        run_part(part, folder, model, measured, options, Limits(args.scale, args.most_tokens))
    tidy(folder, f"python benchmarks/evidence.py --model {name} --dtype {args.dtype}")
    rows = read_rows(folder / ROWS)
    print(write_near({length_text(n): measure_fractions(rows, [n]) for n in sorted({row.length for row in rows})}))


if __name__ == "__main__":
    main()
