"""The bank: reads that flat attention needs are paid for by what sharp attention left over.

A fixed count spends the same on every head and step. Here one threshold on the estimated attention weight, for all
layers, heads and steps of a sequence, says what is read; it is steered so that the mean read stays at the budget, and
two limits hold whatever it says: a layer's heads read at most `burst` times their count, and all reads of a sequence up
to now at most what fixed counts would have read.

In: what a layer would read by a fixed count, then what it did read. Out: caps and a threshold, per sequence: each is
read as it would be alone. Numbers of the host: choices whose counts stay on a device are not varied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from farkv._axes import Int, Tensor
from farkv.store.follow import Cropped

# Of its fixed count, what every head reads whatever weight that has: of flat attention even a few records tell the mean
# value, where none would leave the sinks' alone. Earlier layers of a step must leave later ones as much.
RESERVE = 0.5
# Steps' worth of reads that are kept saved; steps in which what differs from that is spent or saved; how strongly a
# step moves the threshold once it has settled.
SAVED, HORIZON, LEAST_GAIN = 1.0, 4, 0.15
# By how much a step aims beside the budget, at most, to spend what was saved or to save.
MOST_TILT = 1.5
# Reads fall about as this power of the threshold.
POWER = 0.7


class Terms(NamedTuple):
    """What a layer may read now.

    caps, fewest: of every sequence, records per KV head at most, and at least.  least: of every sequence, the estimated
    weight that a record must have, mean over the query group; 0: any.
    """

    caps: list[int]
    fewest: list[int]
    least: list[float]


class Sequence(NamedTuple):
    """What one sequence has read, in records, and its threshold.

    allowed, spent: by fixed counts, and really; of all steps before this one.  now_allowed, now_spent: of this step.
    floors: what a fixed count found to be the least weight, summed powers and their number.
    """

    allowed: float = 0.0
    spent: float = 0.0
    now_allowed: float = 0.0
    now_spent: float = 0.0
    steps: int = 0
    log_least: float = -math.inf
    floors: tuple[float, int] = (0.0, 0)

    def end_step(self) -> Sequence:
        """Return this sequence after a step: the threshold is moved to where the next one reads what it should."""
        if not self.now_allowed:
            return self
        allowed, spent, steps = self.allowed + self.now_allowed, self.spent + self.now_spent, self.steps + 1
        log_least, (total, n) = self.log_least, self.floors
        if log_least == -math.inf:
            # Where a fixed count's last records weigh so much, as many are read by it as by that count.
            log_least = math.log(total / n) / POWER if total > 0 else -math.inf
        else:
            # Without savings the limits would cut reads short, and nothing would say that the threshold is too low.
            saved = (allowed - spent) / self.now_allowed - SAVED
            aim = self.now_allowed * min(MOST_TILT, max(1 / MOST_TILT, 1 + saved / HORIZON))
            log_least += max(LEAST_GAIN, 1 / steps) * math.log(max(self.now_spent, 1.0) / aim)
        return Sequence(allowed, spent, 0.0, 0.0, steps, log_least)


class Bank:
    """The reads of one cache's sequences.

    Args:
        burst: how many times its count a layer's heads may read in one step; 1: counts do not vary.
        layers: those that read by a budget.
    """

    def __init__(self, burst: float, layers: list[int]):
        self.burst, self.layers = burst, layers
        self.sequences: list[Sequence] = []
        # By the tokens that a step found: what was known then, so that tokens can be taken back.
        self.before: dict[int, list[Sequence]] = {}

    def lend(self, layer: int, tokens: int, counts: list[int], newest: list[int]) -> Terms:
        """Return what a layer may read, beside its `newest` records, where fixed counts give it `counts`.

        Args:
            tokens: the context's, before this step.
        """
        if tokens not in self.before:
            self.sequences = [each.end_step() for each in self.sequences] or [Sequence()] * len(counts)
            self.before[tokens] = self.sequences
        n_later = sum(each > layer for each in self.layers)
        caps: list[int] = []
        for count, n_newest, each in zip(counts, newest, self.sequences, strict=True):
            fixed = count + n_newest
            room = each.allowed - each.spent + each.now_allowed - each.now_spent
            # What this step's later layers will be allowed is lent, but for a reserve.
            room += fixed + n_later * fixed * (1 - RESERVE)
            caps.append(max(0, min(int(self.burst * count), int(room) - n_newest)) if each.steps else count)
        fewest = [min(cap, int(RESERVE * count)) for cap, count in zip(caps, counts, strict=True)]
        return Terms(caps, fewest, [math.exp(each.log_least) if each.steps else 0.0 for each in self.sequences])

    def note(self, counts: list[int], read: list[float], floors: list[list[float]], newest: list[int]) -> None:
        """Note what the layer that was lent to last has read, per KV head, and the least weights that heads found."""
        found: list[Sequence] = []
        for i, each in enumerate(self.sequences):
            total, n = each.floors
            if not each.steps:
                total, n = total + sum(floor**POWER for floor in floors[i]), n + len(floors[i])
            now_allowed, now_spent = each.now_allowed + counts[i] + newest[i], each.now_spent + read[i] + newest[i]
            found.append(each._replace(now_allowed=now_allowed, now_spent=now_spent, floors=(total, n)))
        self.sequences = found

    # --- the batch, a pass that is taken back -----------------------------------------------------------------

    def snapshot(self) -> Any:
        """Return what a pass changes, for `restore`; what was known before steps changes with the tokens alone."""
        return self.sequences

    def restore(self, state: Any) -> None:
        """Put it back."""
        self.sequences = state

    def join(self, other: Bank) -> None:
        """Let another's sequences follow these; no step of theirs is taken back any more."""
        self.sequences, self.before = self.sequences + other.sequences, {}

    def crop(self, now: Cropped) -> None:
        """Go back to what was known at so many tokens."""
        gone = [n for n in self.before if n >= now.seen]
        if gone:
            # Begins as it did: the first of the steps that are gone ends its predecessor once more, to the same.
            self.sequences = self.before[min(gone)]
        for n in gone:
            del self.before[n]

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Do nothing: reads are counted by sequence."""

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        order = sequences.tolist()
        if self.sequences:
            self.sequences = [self.sequences[i] for i in order]
            self.before = {n: [each[i] for i in order] for n, each in self.before.items()}

    def clear(self) -> None:
        """Forget everything."""
        self.sequences, self.before = [], {}
