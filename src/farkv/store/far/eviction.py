"""Which stored slot goes when room is needed: replacement policies over uses, one use per slot.

In: what was read at each step, and how many slots must go. Out: positions of distinct victims. A set is one row of
slots that competes with itself alone: the slots of one sequence and head ([B, Hkv, S]), or the page frames of a
store ([S]). Knows no bytes: the caller moves or overwrites the slots.

fifo      the oldest
lru       the longest unread
counter   the least read: a saturating count per slot; when one of a set saturates, all of that set are halved
          (InfiniGen's pool)
clock     second chance: a hand passes the slots in their order, takes the first that was not read since it passed
          last, and clears the bits that it passes
score     the least attention mass, an exponential moving sum

Of equal slots the older one goes. A victim is gone from the uses before the next choice: call `keep` where rows
are moved together, `renew` where a slot is filled again. The released InfiniGen simulator left victims among the
candidates and chose the same token again at every step; `choose` cannot, and its tests count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.errors import ConfigError

# Ranks are int64: (value, birth) of a candidate in 32 bits each, below them known garbage, above them the pinned.
GARBAGE, PINNED = -(1 << 62), (1 << 63) - 1


class Uses(NamedTuple):
    """What a policy knows of the slots of some sets; changed in place."""

    # One use per slot, [*sets, S], in the policy's dtype.
    values: Tensor
    # The slot at which the clock's hand stands, [*sets]; 0 for all other policies.
    hand: Int[Tensor, "*sets"]


@dataclass(frozen=True)
class Policy(ABC):
    """One way to choose victims; holds no state of its own."""

    dtype: ClassVar[torch.dtype]

    def start(self, shape: Sequence[int], now: int, device: torch.device) -> Uses:
        """Return uses of slots that are stored at step `now`, with the hand at the first slot."""
        values = torch.full(tuple(shape), self._first(now), dtype=self.dtype, device=device)
        return Uses(values, torch.zeros(tuple(shape[:-1]), dtype=torch.int64, device=device))

    def renew(self, uses: Uses, positions: Int[Tensor, "*sets K"], now: int) -> None:
        """Mark slots that hold something new since step `now`."""
        uses.values.scatter_(-1, positions, self._first(now))

    @abstractmethod
    def touch(
        self,
        uses: Uses,
        positions: Int[Tensor, "*sets K"],
        valid: Bool[Tensor, "*sets K"] | None,
        now: int,
        weights: Float[Tensor, "*sets K"] | None = None,
    ) -> None:
        """Note that slots were read at step `now`.

        Args:
            positions: distinct where valid; an invalid one changes nothing, wherever it points.
            now: never less than at an earlier call.
            weights: attention mass, at least 0; only `score` looks at it, and needs it.
        """

    def choose(
        self,
        uses: Uses,
        births: Int[Tensor, "*sets S"],
        n: int,
        pinned: Bool[Tensor, "*sets S"],
        first: Bool[Tensor, "*sets S"] | None = None,
    ) -> Int[Tensor, "*sets n"]:
        """Return `n` distinct victims per set, ascending; never a pinned one.

        Args:
            births: when each slot was stored, at least 0; among equals of one birth any may go.
            pinned: at least `n` slots of every set are not.
            first: known garbage, padding for instance; it goes before all else unless pinned.

        Cost: one pass over all slots, and a partial sort.
        """
        ranks = (self._order(uses.values).long() << 32) + births.long()
        if first is not None:
            ranks = torch.where(first, births.long() + GARBAGE, ranks)
        return _least(ranks.masked_fill(pinned, PINNED), n).indices.sort(-1).values

    def keep(self, uses: Uses, positions: Int[Tensor, "*sets K"]) -> Uses:
        """Return the uses of the slots at ascending `positions`, which now stand side by side."""
        # A hand stands before the same slot as it did; behind the last one it is before the first.
        hand = (positions < uses.hand[..., None]).sum(-1) % max(1, positions.shape[-1])
        return Uses(uses.values.gather(-1, positions), hand)

    @abstractmethod
    def _first(self, now: int) -> int:
        """Return the use of a new slot."""

    def _order(self, values: Tensor) -> Tensor:
        """Return non-negative integers of at most 31 bits in the order of the values."""
        return values


class Fifo(Policy):
    """The oldest goes; reading changes nothing."""

    dtype = torch.uint8

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Do nothing."""

    def _first(self, now: int) -> int:
        return 0


class Lru(Policy):
    """The longest unread goes; to be stored is to be read."""

    dtype = torch.int32

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Set the step of the last use."""
        step = torch.full_like(positions, now, dtype=torch.int32)
        # No step is below 0, and no use above `now`: the maximum changes what is valid and nothing else.
        step = step if valid is None else step.masked_fill_(~valid, 0)
        uses.values.scatter_reduce_(-1, positions, step, "amax")

    def _first(self, now: int) -> int:
        return now


@dataclass(frozen=True)
class Counter(Policy):
    """The least read goes, by InfiniGen's saturating counter."""

    dtype = torch.uint8
    # At most what a byte holds.
    limit: int = 255

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Add one to each; halve the counters of a set in which one reaches the limit."""
        ones = torch.ones_like(positions, dtype=torch.uint8) if valid is None else valid.to(torch.uint8)
        uses.values.scatter_add_(-1, positions, ones)
        # Only what was read can be full now.
        full = (uses.values.gather(-1, positions) >= self.limit).any(-1, keepdim=True)
        uses.values.bitwise_right_shift_(full.to(torch.uint8))

    def _first(self, now: int) -> int:
        return 0


class Clock(Policy):
    """Second chance, in slot order; to be stored is to be read."""

    dtype = torch.uint8

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Set the bits."""
        bits = torch.ones_like(positions, dtype=torch.uint8) if valid is None else valid.to(torch.uint8)
        uses.values.scatter_reduce_(-1, positions, bits, "amax")

    def choose(
        self, uses: Uses, births: Tensor, n: int, pinned: Tensor, first: Tensor | None = None
    ) -> Int[Tensor, "*sets n"]:
        """Return `n` distinct victims per set, ascending, and move the hand behind the last of them.

        A pinned slot is passed and keeps its bit. Known garbage needs no hand: it goes first, and where it is enough
        neither hand nor bits change. Births decide nothing: the hand does.
        """
        n_slots = births.shape[-1]
        turn = (torch.arange(n_slots, device=births.device) - uses.hand[..., None]) % max(1, n_slots)
        # A slot that was read is met again a round later, when its bit is cleared. There is no third round.
        ranks = turn + n_slots * uses.values.long()
        if first is not None:
            ranks = torch.where(first, turn + GARBAGE, ranks)
        least = _least(ranks.masked_fill(pinned, PINNED), n)
        if n:
            last = least.values.amax(-1, keepdim=True)
            uses.values.masked_fill_((turn <= last) & ~pinned, 0)
            # Only garbage went where `last` is below 0.
            step = torch.where(last < 0, 0, last % n_slots + 1).squeeze(-1)
            uses.hand.add_(step).remainder_(n_slots)
        return least.indices.sort(-1).values

    def _first(self, now: int) -> int:
        return 1


@dataclass(frozen=True)
class Score(Policy):
    """The least attention mass goes, summed with older mass fading; one touch is one step."""

    dtype = torch.float32
    decay: float = 0.9

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Let all uses fade, and add the new mass."""
        assert weights is not None
        mass = weights.float()
        mass = mass if valid is None else mass.masked_fill(~valid, 0)
        uses.values.mul_(self.decay).scatter_add_(-1, positions, mass)

    def _first(self, now: int) -> int:
        return 0

    def _order(self, values: Tensor) -> Tensor:
        # The bits of float32 numbers that are not negative are in the order of the numbers.
        return values.contiguous().view(torch.int32)


_POLICIES: dict[str, type[Policy]] = {"fifo": Fifo, "lru": Lru, "counter": Counter, "clock": Clock, "score": Score}
POLICIES = tuple(_POLICIES)


def make_policy(name: str) -> Policy:
    """Return the policy of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _POLICIES:
        raise ConfigError(f"eviction policy: expected one of {', '.join(POLICIES)}, got {name!r}; name one of these")
    return _POLICIES[name]()


def _least(ranks: Tensor, n: int) -> torch.return_types.topk:
    return ranks.topk(n, -1, largest=False, sorted=False)
