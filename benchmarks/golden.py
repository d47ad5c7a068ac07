"""What does every configuration answer, read, hold and move? Golden receipts, to be taken before code is moved.

    python benchmarks/golden.py --out FILE
    python benchmarks/golden.py --check FILE

In: the rows of `golden_rows.py`. Out: a JSON line per row with its tokens, a digest of the raw logits, a few logits in
six digits and the receipt, or the error that refused it. `--check` runs all again and says of every row: same, logits
differ in rounding, or differs, with what differs; it exits 1 where anything but rounding does. `--only NAME` takes rows
whose name holds NAME. Through the public API alone. One thread; a row does not depend on the rows before it.

Left out of receipts: `time` and `versions` (the first line of the file has the versions). All else was the same bit for
bit in repeated runs on one machine. Logits, and so digests and the keys in ROUNDED, depend on the instruction set and
the torch release: compare files of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from golden_play import Played, Row, play
from golden_rows import FACTS, ROWS
from transformers.utils import logging

# Sums over logits or weights: they follow the logits' rounding, where digests differ.
ROUNDED = ("kl_mean", "mass_mean", "mass_min", "max_error")
TOLERANCE = 1e-3

Line = dict[str, Any]


# --- one row ------------------------------------------------------------------------------------------------


def describe(played: Played) -> Line:
    """Return what a run gave: all logits as a digest, the first four of three steps to be read."""
    digest = hashlib.sha256()
    for step in played.logits:
        digest.update(step.float().contiguous().numpy().tobytes())
    n = len(played.logits)
    shown = {0, n // 2, n - 1} if n else ()
    some = {i: [[float(f"{x:.6g}") for x in row] for row in played.logits[i][:, :4].tolist()] for i in sorted(shown)}
    receipt = None
    if played.receipt is not None:
        receipt = {key: value for key, value in played.receipt.items() if key not in ("time", "versions")}
    line = {"tokens": played.tokens, "digest": digest.hexdigest(), "logits": some, "receipt": receipt}
    return json.loads(json.dumps(line | {"error": played.error}))


@torch.no_grad()
def run_row(row: Row) -> Line:
    """Run one configuration in a folder of its own and return its line."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        line = {"name": row.name, **describe(play(row, Path(folder)))}
    return line | {"missed": find_missed(row, line)}


def find_missed(row: Row, line: Line) -> list[str]:
    """Return what the row was to show and does not."""
    if (line["error"] is not None) != ("refused" in row.means):
        return ["refused"]
    return [name for name in row.means if name != "refused" and not FACTS[name](line["receipt"])]


def describe_machine() -> Line:
    """Return what logits depend on besides the code."""
    names = ("torch", "transformers", "numpy")
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


# --- two runs -----------------------------------------------------------------------------------------------


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give every number, text and None in nested JSON values with the path to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    yield path + "#", len(value)
    for key, part in items:
        yield from flatten(part, f"{path}.{key}" if path else str(key))


def compare(old: Line, new: Line) -> tuple[str, list[str]]:
    """Return what became of a row: same, rounding or differs; and what differs, old and new."""
    rounds = old["digest"] != new["digest"]
    before, after = dict(flatten(old)), dict(flatten(new))
    changed = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if key == "digest" or was == now:
            continue
        loose = key.startswith("logits.") or key.rsplit(".", 1)[-1] in ROUNDED
        numbers = isinstance(was, float) and isinstance(now, float)
        if not (rounds and loose and numbers and math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE)):
            changed.append(f"{key}: {was!r} -> {now!r}")
    return ("differs" if changed else "rounding" if rounds else "same"), changed


def check_rows(rows: list[Row], path: Path) -> bool:
    """Run rows again and say what became of each; return whether all are same or rounded."""
    head, *lines = [json.loads(text) for text in path.read_text().splitlines()]
    old, good = {line["name"]: line for line in lines}, True
    for key, value in describe_machine().items():
        if head[key] != value:
            print(f"other {key}: {head[key]} -> {value}; logits may differ")
    for row in rows:
        if row.name not in old:
            print(f"new        {row.name}")
            continue
        said, changed = compare(old[row.name], run_row(row))
        good = good and not changed
        print(f"{'logits differ in rounding' if said == 'rounding' else said:10} {row.name}", *changed, sep="\n    ")
    return good


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--only", default="", help="a part of the rows' names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows, start = [row for row in ROWS if args.only in row.name], time.perf_counter()
    if args.out:
        lines = [run_row(row) for row in rows]
        args.out.write_text("".join(json.dumps(line) + "\n" for line in [describe_machine(), *lines]))
        missed = [f"{line['name']}: expected {', '.join(line['missed'])}" for line in lines if line["missed"]]
        print(*missed, sep="\n", end="\n" if missed else "")
    good = check_rows(rows, args.check) if args.check else not missed
    print(f"{len(rows)} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(not good)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        # Neither what was measured of this machine nor a forced kernel may decide a row.
        os.environ["FARKV_CACHE_DIR"] = empty
        os.environ.pop("FARKV_KERNEL", None)
        main()
