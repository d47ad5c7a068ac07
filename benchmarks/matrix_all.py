"""Is every causal language model of transformers right with our caches, or refused in words? Each in its own child.

    python benchmarks/matrix_all.py                            # all: `make matrix-all`
    python benchmarks/matrix_all.py --only llama,gemma2 --json
    python benchmarks/matrix_all.py --part 10 --seed 335       # a tenth; ten seeds in a row are all

In: the configurations of the installed transformers, tiny (`matrix_models.py`). Out: a JSON line per model in
results/matrix/VERSION.jsonl, of which `tables.py` makes docs/supported.md. Exits 1 where a row has a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from matrix_models import list_names
from matrix_play import make_row
from matrix_table import FAULT, format_summary, judge_row
from rows import RESULTS, Row, Rows, read_rows
from runs import read_names

LIMIT_S, LIMIT_BYTES = 300, 6 << 30


def choose_part(names: list[str], part: int, seed: int) -> list[str]:
    """Return every `part`-th name of a shuffled list: `part` seeds in a row are all of them."""
    order = sorted(names)
    random.Random(seed // part).shuffle(order)
    return order[seed % part :: part]


def run_child(name: str, attention: str = "", limit_s: float = LIMIT_S) -> Row:
    """Return a model's row, made by a fork of this process, which has imported everything and runs one thread."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        answer(name, attention, write)
    os.close(write)
    text, ends = b"", time.monotonic() + limit_s
    while select.select([read], [], [], max(0.0, ends - time.monotonic()))[0]:
        if not (more := os.read(read, 1 << 16)):
            break
        text += more
    else:
        os.kill(child, signal.SIGKILL)
        text = json.dumps({"model": name, "crash": f"took more than {limit_s:.0f} s"}).encode()
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if text else {"model": name, "crash": f"the child ended with {status}"}


def answer(name: str, attention: str, write: int) -> None:
    """Write a model's row into a pipe, and end this process, whatever happens."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        started = time.monotonic()
        try:
            row = make_row(name, attention)
        except Exception as error:
            row = {"model": name, "crash": f"{type(error).__name__}: {error}"[:300]}
        with os.fdopen(write, "wb") as pipe:
            pipe.write(json.dumps(row | {"seconds": round(time.monotonic() - started, 1)}).encode())
    finally:
        os._exit(0)


def find_revision() -> str:
    """Return the commit that is run, "+" behind it where what is run differs from it."""

    def ask(*command: str) -> str:
        git = ["git", "-C", str(RESULTS.parent.parent), *command]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()

    changed = ask("status", "--porcelain", "src", "benchmarks/*.py")
    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def write_rows(out: Path, rows: Rows) -> None:
    """Put rows into a file, in the place of older ones of the same models: a run that is stopped keeps what it has.

    Every single play is kept of a fault alone.
    """
    out.parent.mkdir(exist_ok=True)
    old = {row["model"]: row for row in (read_rows(out) if out.exists() else [])}
    found = old | {row["model"]: dict(row) for row in rows}
    for row in found.values():
        if judge_row(row) != FAULT:
            row.pop("cells", None)
    out.write_text("".join(json.dumps(found[name]) + "\n" for name in sorted(found)))


def read_path(text: str) -> Path:
    """Return a path that stands in no folder of ours."""
    return Path(text).resolve()


def say(done: int, names: list[str], row: Row, started: float) -> None:
    """Show how far the run is."""
    seconds = time.monotonic() - started
    left = seconds / done * (len(names) - done)
    sys.stderr.write(f"{done}/{len(names)} {row['model']}: {judge_row(row)}, {seconds:.0f} s, {left:.0f} s left\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=[], type=read_names, help="configurations, by commas")
    parser.add_argument("--part", default=1, type=int, help="run one of so many parts")
    parser.add_argument("--seed", default=int(time.time() // 86400), type=int, help="which part (default: by the day)")
    parser.add_argument("--json", action="store_true", help="print the rows")
    parser.add_argument("--attention", default="", help="attention of the plain model (default: its own choice)")
    parser.add_argument("--out", type=read_path, help="file that rows go into (default: none, but for a run of all)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = args.only or choose_part(list_names(), args.part, args.seed)
    if args.part > 1:
        sys.stderr.write(f"one of {args.part} parts, seed {args.seed}: {len(names)} of {len(list_names())} models\n")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "revision": find_revision()}
    is_all = not args.only and not args.attention and args.part == 1
    out = args.out or (RESULTS / "matrix" / f"{transformers.__version__}.jsonl" if is_all else None)
    started, rows = time.monotonic(), Rows()
    for name in names:
        rows.append(run_child(name, args.attention) | versions)
        say(len(rows), names, rows[-1], started)
        if out is not None:
            write_rows(out, rows)
    if args.json:
        print(json.dumps(rows, indent=1))
    faults = [row for row in rows if judge_row(row) == FAULT]
    for row in faults:
        sys.stderr.write(f"{json.dumps(row, indent=1)}\n")
    sys.stderr.write(format_summary(rows) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
