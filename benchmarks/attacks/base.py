"""What an attack is, and how one try of it is judged."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import Literal, NamedTuple

from farkv import FarKVError

# What one try came to: the right answer; an error of farkv's, in words; an answer that is not the right one, a
# traceback of somebody else's error, bytes beyond a limit, or damage to what was there before.
Verdict = Literal["right", "refused", "wrong"]


class Attack(NamedTuple):
    """One attack.

    point: of the list in docs/reliability.md.  says: what is done, for the table.  attempt: one try with this
    generator; several kinds of the same thing are drawn from it.  quick, deep: tries in CI (seconds for all) and in
    the published table (minutes for all).
    """

    point: int
    says: str
    attempt: Callable[[random.Random], Verdict]
    quick: int = 3
    deep: int = 100


class Outcome(NamedTuple):
    """What the tries of an attack came to."""

    tries: int
    wrong: int
    refused: int
    seeds: list[int]


def judge(attack: Attack, seed: int) -> Verdict:
    """Make one try: an error of farkv's that nobody caught is a refusal too, any other is wrong."""
    try:
        return attack.attempt(random.Random(seed))
    except FarKVError:
        return "refused"
    except Exception:
        traceback.print_exc()
        return "wrong"


def run_attack(attack: Attack, tries: int, seed: int = 0) -> Outcome:
    """Make the tries with seeds `seed`, `seed + 1`, ...; return the counts, and the seeds that went wrong."""
    said = {at: judge(attack, at) for at in range(seed, seed + tries)}
    wrong = [at for at, verdict in said.items() if verdict == "wrong"]
    return Outcome(tries, len(wrong), list(said.values()).count("refused"), wrong)
