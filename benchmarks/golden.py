"""What does every configuration answer, read, hold and move? Golden receipts, to be taken before code is moved.

    python benchmarks/golden.py --out FILE
    python benchmarks/golden.py --check FILE

In: the rows of `golden_rows.py`. Out: a JSON line per row with its tokens, a digest of the raw logits, a few logits in
six digits and the receipt, or the error that refused it. `--check` runs all again and says of every row: same,
rounding (logits and the keys in ROUNDED alone, by less than TOLERANCE), reworded (an error with the same numbers in
other words), or differs, with what differs, old and new; it exits 1 where something differs. `--only NAME` takes rows
whose name holds NAME.

Left out: the receipt's `time` and `versions`; the first line of the file has the versions. Logits, and so digests and
the keys in ROUNDED, depend on the instruction set and the torch release: compare files of one machine.

With workers on threads of their own (`--threads`) some rows depend on timing, most of all on a busy machine: over a
disk and in a session, which pages have a copy in memory depends on how far the link's thread is when the model's thread
uses or adds copies. Seen so far: `disk_bytes_per_token` by a few pages (`session/*`, `beams/disk`), and where records
are speculated also `fetched_bytes_per_token`, tokens and logits (`disk/paper`; `disk/fills`, in 1 of 25 runs of a step
that completes a page). So here a worker's job is done when it is submitted: one of the orders that threads may take,
and always the same. No other key differed in five runs with threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from golden_models import Row
from golden_play import Played, play
from golden_rows import ROWS
from transformers.utils import logging

import farkv.errors

# Keys of the receipt that are sums over logits or weights, in whatever order.
ROUNDED = ("kl_mean", "mass_mean", "mass_min", "max_error")
TOLERANCE = 1e-3
# Differences of one row that are printed.
MOST_SHOWN = 12

Line = dict[str, Any]

# What a row is there for must happen in it.
FACTS: dict[str, Callable[[Line], bool]] = {
    "sparse": lambda r: 0 < r["read_fraction"] < 0.6,
    "index": lambda r: r["index_fraction"] > 0 and r["kv_bytes"]["index_peak"] > 0,
    "far": lambda r: r["fetched_bytes_per_token"] > 0,
    # Less crosses than is read and is not in the window: the recently used set, or what is held near, has the rest.
    "hot": lambda r: 0 < r["fetched_bytes_per_token"] < 0.7 * r["read_fraction"] * r["kv_bytes"]["total"],
    # Near memory is smaller than one layer of four: dense passes read it block by block.
    "blocks": lambda r: r["limits"]["near"] < r["kv_bytes"]["total"] / 4,
    "disk": lambda r: r["kv_bytes"]["disk_peak"] > 0 and r["disk_bytes_per_token"] > 0,
    # Pages of a session are read, none is written.
    "lazy": lambda r: r["kv_bytes"]["disk_peak"] == 0 and r["disk_bytes_per_token"] > 0,
    "evicted": lambda r: r["evicted_records"] > 0 and r["kept_fraction"] < 1,
    "quant": lambda r: bool(r["quant"]["max_error"]),
    "verified": lambda r: r["quality"] is not None,
    "native": lambda r: r["kernel"].startswith("native"),
    "plain": lambda r: r["kernel"].startswith("torch"),
    "unmanaged": lambda r: not all(layer["managed"] for layer in r["layers"]),
    "fallback": lambda r: len(r["fallbacks"]) > 0,
}


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
        # Of a model that was loaded it is the path.
        receipt["model"] = Path(receipt["model"]).name
    line = {"tokens": played.tokens, "digest": digest.hexdigest(), "logits": some, "receipt": receipt}
    return json.loads(json.dumps(line | {"error": played.error}))


def run_at_once(_pool: ThreadPoolExecutor, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Do a worker's job before `submit` returns."""
    done: Future[Any] = Future()
    try:
        done.set_result(work(*args, **kwargs))
    except BaseException as error:
        done.set_exception(error)
    return done


@torch.no_grad()
def run_row(row: Row) -> Line:
    """Run one configuration in a folder of its own and return its line."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        line = {"name": row.name, **describe(play(row, Path(folder)))}
    return line | {"missed": find_missed(row, line)}


def find_missed(row: Row, line: Line) -> list[str]:
    """Return what the row was to show and does not."""
    error, meant = line["error"], "refused" if "refused" in row.means else "runs"
    found = "runs" if error is None else "refused" if hasattr(farkv.errors, error[0]) else error[0]
    if found != meant:
        return [f"{meant}, got {found}"]
    return [] if error else [name for name in row.means if not FACTS[name](line["receipt"])]


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
    """Return what became of a row, and what differs, old and new."""
    before, after = dict(flatten(old)), dict(flatten(new))
    changed, said = [], "same"
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if key == "error.1" and list_numbers(was) == list_numbers(now):
            said = "reworded"
        elif is_rounding(key, was, now):
            said = "rounding"
        else:
            changed.append(f"{key}: {was!r} -> {now!r}")
    return "differs" if changed else said, changed


def is_rounding(key: str, was: Any, now: Any) -> bool:
    """Say whether two values may differ by rounding alone: the shown logits say it for the digest."""
    if key == "digest":
        return True
    if not (key.startswith("logits.") or key.rsplit(".", 1)[-1] in ROUNDED):
        return False
    numbers = isinstance(was, float) and isinstance(now, float)
    return numbers and math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def list_numbers(text: Any) -> list[str]:
    """Return the numbers in a message."""
    return re.findall(r"\d[\d.,]*", str(text))


def check_rows(rows: list[Row], path: Path, only: str) -> bool:
    """Run rows again and say what became of each; return whether nothing differs."""
    head, *lines = [json.loads(text) for text in path.read_text().splitlines()]
    for key, value in describe_machine().items():
        if head[key] != value:
            print(f"other {key}: {head[key]} -> {value}; logits may differ")
    old, counts = {line["name"]: line for line in lines if only in line["name"]}, Counter[str]()
    for row in rows:
        said, changed = compare(old.pop(row.name), run_row(row)) if row.name in old else ("new", [])
        more = [f"and {len(changed) - MOST_SHOWN} more"] if len(changed) > MOST_SHOWN else []
        print(f"{said:10} {row.name}", *changed[:MOST_SHOWN], *more, sep="\n    ")
        counts[said] += 1
    for name in old:
        print(f"gone       {name}")
        counts["gone"] += 1
    print(", ".join(f"{n} {said}" for said, n in counts.items()))
    return not (counts["differs"] or counts["gone"])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--check", type=Path)
    parser.add_argument("--only", default="", help="a part of the rows' names")
    parser.add_argument("--threads", action="store_true", help="leave workers their threads")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.threads:
        ThreadPoolExecutor.submit = run_at_once
    logging.set_verbosity_error()
    rows, start = [row for row in ROWS if args.only in row.name], time.perf_counter()
    good = True
    if args.check:
        good = check_rows(rows, args.check, args.only)
    else:
        lines = [run_row(row) for row in rows]
        args.out.write_text("".join(json.dumps(line) + "\n" for line in [describe_machine(), *lines]))
        for line in lines:
            if line["missed"]:
                print(f"missed     {line['name']}: {', '.join(line['missed'])}")
                good = False
    print(f"{len(rows)} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(not good)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        # Neither what was measured of this machine nor a forced kernel may decide a row.
        os.environ["FARKV_CACHE_DIR"] = empty
        os.environ.pop("FARKV_KERNEL", None)
        main()
