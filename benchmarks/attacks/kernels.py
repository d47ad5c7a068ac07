"""Attacks on the native kernels: arguments that do not fit, values that are no numbers, and memory that ends.

Each try is made by a child: what reads too far ends the process.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable

import torch
from fences import Fences
from kernel_calls import draw_call
from kernel_misuse import WRONG, call, make_right

from attacks.base import Attack, Verdict
from farkv.errors import FarKVError
from farkv.kernels.native import Native, list_native

# Of one try: to start a child takes longer than many calls.
CALLS = 20
KINDS = sum(map(len, WRONG.values()))
VERDICTS: tuple[Verdict, ...] = ("right", "refused", "wrong")


def in_child(attempt: Callable[[random.Random], Verdict]) -> Callable[[random.Random], Verdict]:
    """Return the attempt as a child makes it; one that does not return a verdict is wrong."""

    def make(rng: random.Random) -> Verdict:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = VERDICTS.index("wrong")
            try:
                torch.set_num_threads(1)
                code = VERDICTS.index(attempt(rng))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return VERDICTS[code] if 0 <= code < len(VERDICTS) else "wrong"

    return make


def misuse(rng: random.Random) -> Verdict:
    """Give one entry point one argument that does not fit."""
    torch.manual_seed(rng.getrandbits(40))
    entry, change = rng.choice([(entry, change) for entry, changes in WRONG.items() for change in changes.values()])
    given = make_right(entry)
    change(given)
    try:
        call(Native(rng.choice(list_native())), entry, given)
    except FarKVError:
        return "refused"
    except Exception:
        return "wrong"
    # An answer to a question that has none.
    return "wrong"


def answer(rng: random.Random, *, wild: bool, fenced: bool) -> Verdict:
    """Make random calls, and compare their answers."""
    for _ in range(CALLS):
        drawn = draw_call(rng, wild=wild)
        with Fences() as fences:
            made = drawn.enclose(lambda x, f=fences: f.enclose(x, rng.random() < 0.8)) if fenced else drawn
            try:
                if drawn.check(made.make()):
                    return "wrong"
            except Exception:
                return "wrong"
    return "right"


ATTACKS = {
    "misuse": Attack(11, f"kernels: one argument that does not fit (of {KINDS} kinds)", in_child(misuse), 20, 500),
    "values": Attack(
        11,
        f"kernels: NaN of any bits, infinities, 1e18, denormals, ties, in any shape; {CALLS} calls a try",
        in_child(lambda rng: answer(rng, wild=True, fenced=False)),
        5,
        200,
    ),
    "fences": Attack(
        12,
        f"kernels: every operand ends, or begins, at memory that cannot be read; {CALLS} calls a try",
        in_child(lambda rng: answer(rng, wild=False, fenced=True)),
        5,
        200,
    ),
} if list_native() else {}  # fmt: skip
