"""Replacement policies: which slot to evict when room is needed, by one usage value per slot.

In: what was read at each step, and how many slots to evict. Out: positions of distinct victims. Victims are chosen
within a set, the last axis: the slots of one sequence and head ([B, Hkv, S]), or all slots of a page cache ([S]).
Knows no bytes: the caller moves or overwrites the slots.

fifo      evicts the oldest
lru       the least recently read
counter   the least often read: a saturating count per slot; when one saturates, all of its set are halved
          (InfiniGen's pool)
clock     second chance: a hand goes round the slots, clears the bit of those read since its last round, and evicts the
          first that was not
score     the one with the least attention mass, an exponentially decaying sum

Ties go to the older slot. The caller removes victims before the next choice: by `keep` where rows are compacted, by
`renew` where a slot is filled again. The released InfiniGen simulator left victims among the candidates and chose the
same token at every step; here a victim is chosen once, and tests check it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.errors import ConfigError

# Ranks are int64: (value, birth) in 32 bits each for candidates; garbage ranks below these, pinned slots above.
GARBAGE, PINNED = -(1 << 62), (1 << 63) - 1


class Uses(NamedTuple):
    """The usage values of the slots of some sets, and the clock's hand; changed in place."""

    # One per slot, [*sets, S], in the policy's dtype.
    values: Tensor
    # The slot that the clock's hand is at, [*sets]; 0 for all other policies.
    hand: Int[Tensor, "*sets"]


@dataclass(frozen=True)
class Policy(ABC):
    """A way to choose victims; stateless."""

    dtype: ClassVar[torch.dtype]

    def start(self, shape: Sequence[int], now: int, device: torch.device) -> Uses:
        """Return the usage of slots that are filled at step `now`, with the hand at the first slot."""
        values = torch.full(tuple(shape), self._first(now), dtype=self.dtype, device=device)
        return Uses(values, torch.zeros(tuple(shape[:-1]), dtype=torch.int64, device=device))

    def renew(self, uses: Uses, positions: Int[Tensor, "*sets K"], now: int) -> None:
        """Reset the usage of slots that were filled anew at step `now`."""
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
        """Record that slots were read at step `now`.

        Args:
            positions: distinct where valid; invalid ones are ignored, whatever they are.
            now: never decreases from call to call.
            weights: attention mass, at least 0; required by `score`, ignored by the others.
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
            births: the step at which each slot was filled, at least 0; ties of one birth are broken arbitrarily.
            pinned: slots that must stay; at least `n` slots of every set are not pinned.
            first: known garbage, padding for instance; evicted before all else unless pinned.

        Cost: one pass over all slots, and a partial sort.
        """
        ranks = (self._order(uses.values).long() << 32) + births.long()
        if first is not None:
            ranks = torch.where(first, births.long() + GARBAGE, ranks)
        return _least(ranks.masked_fill(pinned, PINNED), n).indices.sort(-1).values

    def keep(self, uses: Uses, positions: Int[Tensor, "*sets K"]) -> Uses:
        """Return the usage of the slots at ascending `positions`, which are compacted to the front."""
        # The hand stays at its slot, or moves to the next one that is kept, wrapping around at the end.
        hand = (positions < uses.hand[..., None]).sum(-1) % max(1, positions.shape[-1])
        return Uses(uses.values.gather(-1, positions), hand)

    @abstractmethod
    def _first(self, now: int) -> int:
        """Return the usage value of a newly filled slot."""

    def _order(self, values: Tensor) -> Tensor:
        """Return non-negative integers of at most 31 bits that sort like the values."""
        return values


class Fifo(Policy):
    """Evicts the oldest slot."""

    dtype = torch.uint8

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Do nothing: reads do not count."""

    def _first(self, now: int) -> int:
        return 0


class Lru(Policy):
    """Evicts the least recently read slot; filling one counts as a read."""

    dtype = torch.int32

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Set the step of the last read."""
        step = torch.full_like(positions, now, dtype=torch.int32)
        # Steps are at least 0 and none is above `now`, so the maximum leaves invalid positions unchanged.
        step = step if valid is None else step.masked_fill_(~valid, 0)
        uses.values.scatter_reduce_(-1, positions, step, "amax")

    def _first(self, now: int) -> int:
        return now


@dataclass(frozen=True)
class Counter(Policy):
    """Evicts the least often read slot, by InfiniGen's saturating counter."""

    dtype = torch.uint8
    # At most 255: counters are bytes.
    limit: int = 255

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Add one to each; halve the counters of a set in which one reaches the limit."""
        ones = torch.ones_like(positions, dtype=torch.uint8) if valid is None else valid.to(torch.uint8)
        uses.values.scatter_add_(-1, positions, ones)
        # Only a slot that was just read can be at the limit.
        full = (uses.values.gather(-1, positions) >= self.limit).any(-1, keepdim=True)
        uses.values.bitwise_right_shift_(full.to(torch.uint8))

    def _first(self, now: int) -> int:
        return 0


class Clock(Policy):
    """Second chance, in slot order; filling a slot counts as a read."""

    dtype = torch.uint8

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Set the read bits."""
        bits = torch.ones_like(positions, dtype=torch.uint8) if valid is None else valid.to(torch.uint8)
        uses.values.scatter_reduce_(-1, positions, bits, "amax")

    def choose(
        self, uses: Uses, births: Tensor, n: int, pinned: Tensor, first: Tensor | None = None
    ) -> Int[Tensor, "*sets n"]:
        """Return `n` distinct victims per set, ascending, and move the hand past the last of them.

        Pinned slots are skipped and keep their bits. Known garbage is taken first, without the hand; where that is
        enough, neither hand nor bits change. Births are ignored.
        """
        n_slots = births.shape[-1]
        turn = (torch.arange(n_slots, device=births.device) - uses.hand[..., None]) % max(1, n_slots)
        # A slot that was read comes up a round later, with its bit cleared: there are at most two rounds.
        ranks = turn + n_slots * uses.values.long()
        if first is not None:
            ranks = torch.where(first, turn + GARBAGE, ranks)
        least = _least(ranks.masked_fill(pinned, PINNED), n)
        if n:
            last = least.values.amax(-1, keepdim=True)
            uses.values.masked_fill_((turn <= last) & ~pinned, 0)
            # Where `last` is below 0, only garbage was evicted.
            step = torch.where(last < 0, 0, last % n_slots + 1).squeeze(-1)
            uses.hand.add_(step).remainder_(n_slots)
        return least.indices.sort(-1).values

    def _first(self, now: int) -> int:
        return 1


@dataclass(frozen=True)
class Score(Policy):
    """Evicts the slot with the least attention mass: a sum that decays by `decay` at every touch."""

    dtype = torch.float32
    decay: float = 0.9

    def touch(
        self, uses: Uses, positions: Tensor, valid: Tensor | None, now: int, weights: Tensor | None = None
    ) -> None:
        """Decay all sums, and add the new mass."""
        assert weights is not None
        mass = weights.float()
        mass = mass if valid is None else mass.masked_fill(~valid, 0)
        uses.values.mul_(self.decay).scatter_add_(-1, positions, mass)

    def _first(self, now: int) -> int:
        return 0

    def _order(self, values: Tensor) -> Tensor:
        # The bit patterns of non-negative float32 numbers sort like the numbers.
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
