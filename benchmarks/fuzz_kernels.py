"""Does any native kernel answer otherwise than plain arithmetic, or touch what it was not given? Random calls.

    python benchmarks/fuzz_kernels.py --minutes 10
    python benchmarks/fuzz_kernels.py --seed 5 --calls 100 --first 1234     # calls 1234 .. 1333 of seed 5, once more

In: random calls (`kernel_calls.py`), most operands of which end, or begin, beside memory that cannot be read. Out: one
JSON line, and on stderr each call that was wrong, by its seed and number. A child process makes them, a hundred at a
time: where it dies, the number of its call is known. Exits 1 where one was wrong or ended the child.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import sys
import time
import traceback
import warnings

import torch
from fences import Fences
from kernel_calls import Call, draw_call

BATCH = 100
# What a call came to, one byte each, in memory that parent and child share.
OUTCOMES = ["not made", "right", "wrong", "raised", "ended the process"]
STARTED = len(OUTCOMES) - 1


def make_drawn(seed: int, number: int) -> tuple[Call, random.Random]:
    """Return call `number` of a seed, and the generator as it is after."""
    rng = random.Random(f"{seed}:{number}")
    return draw_call(rng), rng


def try_call(seed: int, number: int) -> str:
    """Make one call, and compare what it returns."""
    drawn, rng = make_drawn(seed, number)
    try:
        with Fences() as fences:
            fenced = rng.random() < 0.8
            call = drawn.enclose(lambda x: fences.enclose(x, rng.random() < 0.8)) if fenced else drawn
            # The checks read the operands as they were drawn, not these.
            fault = drawn.check(call.make())
    except Exception:
        traceback.print_exc()
        fault = "raised"
    if fault:
        sizes = {name: tuple(x.shape) for name, x in drawn.arguments.items() if isinstance(x, torch.Tensor)}
        sys.stderr.write(f"call {number} of seed {seed}: {drawn.entry} by {drawn.isa}, {sizes}: {fault}\n")
    return "right" if fault is None else "raised" if fault == "raised" else "wrong"


def run_batch(seed: int, first: int, count: int) -> list[str]:
    """Make calls in a child; return what each came to."""
    board = mmap.mmap(-1, count)
    with warnings.catch_warnings():
        # This process has no threads of its own to be missed.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        for at in range(count):
            board[at] = STARTED
            board[at] = OUTCOMES.index(try_call(seed, first + at))
        sys.stderr.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.stderr.write(
            f"seed {seed}, from call {first} on: the child ended with {os.waitstatus_to_exitcode(status)}\n"
        )
    return [OUTCOMES[board[at]] for at in range(count)]


def main() -> None:
    """Parse the command line, make calls until the time is over, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default=10.0, type=float)
    parser.add_argument("--calls", default=0, type=int, help="so many instead")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--first", default=0, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, outcomes, at = time.perf_counter(), collections.Counter[str](), args.first
    while at < args.first + args.calls if args.calls else time.perf_counter() - started < args.minutes * 60:
        count = min(BATCH, args.first + args.calls - at) if args.calls else BATCH
        found = run_batch(args.seed, at, count)
        # What a child that died has not made is made by the next.
        made = [outcome for outcome in found if outcome != "not made"]
        outcomes.update(made)
        at += len(made)
    bad = {name: outcomes[name] for name in OUTCOMES[2:]}
    line = {"calls": outcomes.total(), **bad, "seconds": round(time.perf_counter() - started, 1), "seed": args.seed}
    print(json.dumps(line | {"first": args.first}))
    sys.exit(1 if any(bad.values()) else 0)


if __name__ == "__main__":
    main()
