"""Every policy against a plain simulator of one set that takes one victim at a time, on random traces."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import ConfigError
from farkv.store.far.eviction import POLICIES, Counter, Policy, Uses, make_policy

CPU = torch.device("cpu")
LIMIT = 4


@dataclass(eq=False)
class Slot:
    birth: int
    use: float = 0
    pinned: bool = False
    garbage: bool = False


class Simulator:
    """One set, as a list of slots and a hand; a new slot's use is what its policy's text says."""

    def __init__(self, name: str, births: list[int], now: int):
        self.name, self.hand = name, 0
        self.slots = [self.new(birth, now) for birth in births]

    def new(self, birth: int, now: int) -> Slot:
        return Slot(birth, {"lru": now, "clock": 1}.get(self.name, 0))

    def read(self, positions: list[int], now: int, weights: list[float]) -> None:
        if self.name == "score":
            for slot in self.slots:
                slot.use = np.float32(slot.use) * np.float32(0.9)
        for position, weight in zip(positions, weights, strict=True):
            slot = self.slots[position]
            match self.name:
                case "lru":
                    slot.use = now
                case "counter":
                    slot.use += 1
                case "clock":
                    slot.use = 1
                case "score":
                    slot.use = np.float32(slot.use) + np.float32(weight)
        if self.name == "counter" and any(slot.use >= LIMIT for slot in self.slots):
            for slot in self.slots:
                slot.use //= 2

    def evict(self, n: int) -> list[int]:
        taken: list[int] = []
        for _ in range(n):
            left = [i for i, s in enumerate(self.slots) if i not in taken and not s.pinned]
            waste = [i for i in left if self.slots[i].garbage]
            if self.name == "clock":
                taken.append(min(waste, key=self.turn) if waste else self.sweep(left))
            else:
                taken.append(min(waste or left, key=lambda i: (0 if waste else self.slots[i].use, self.slots[i].birth)))
        return sorted(taken)

    def turn(self, i: int) -> int:
        return (i - self.hand) % len(self.slots)

    def sweep(self, left: list[int]) -> int:
        """Move the hand as the textbook does: a set bit is cleared and passed, a clear one is the victim."""
        while True:
            i, self.hand = self.hand, (self.hand + 1) % len(self.slots)
            if i in left and not self.slots[i].use:
                return i
            if i in left:
                self.slots[i].use = 0

    def remove(self, victims: list[int]) -> None:
        at = self.slots[self.hand :]
        self.slots = [s for i, s in enumerate(self.slots) if i not in victims]
        following = [s for s in at if s in self.slots]
        self.hand = self.slots.index(following[0]) if following else 0


def policy_of(name: str) -> Policy:
    return Counter(LIMIT) if name == "counter" else make_policy(name)


class Trace:
    """The same random life of some sets, through a policy and through a simulator per set."""

    def __init__(self, name: str, shape: tuple[int, ...], n_slots: int, seed: int):
        self.rng, self.shape, self.name = random.Random(seed), shape, name
        self.n_sets = int(np.prod(shape))
        self.policy, self.now = policy_of(name), 0
        births = [self.rng.sample(range(n_slots), n_slots) for _ in range(self.n_sets)]
        self.sets = [Simulator(name, b, 0) for b in births]
        self.births = self.fold(births).int()
        self.uses = self.policy.start((*shape, n_slots), 0, CPU)
        self.clock, self.n_evicted, self.gone = n_slots, 0, [set() for _ in self.sets]

    def fold(self, rows: list[list]) -> torch.Tensor:
        return torch.tensor(rows).view(*self.shape, -1)

    def read(self, k: int) -> None:
        """Read up to k slots of every set; the rest of the positions are invalid and point anywhere."""
        n_slots = self.births.shape[-1]
        positions, valid, weights = [], [], []
        for one in self.sets:
            n = self.rng.randint(0, min(k, n_slots))
            real = self.rng.sample(range(n_slots), n)
            mass = [self.rng.choice([0.0, 0.25, 0.5, self.rng.random()]) for _ in range(k)]
            order = self.rng.sample(range(k), k)
            mixed = (real + [self.rng.randrange(n_slots) for _ in range(k - n)], [i < n for i in range(k)])
            one.read(real, self.now, mass[:n])
            noise = mass[:n] + [float("nan")] * (k - n)
            positions.append([mixed[0][i] for i in order])
            valid.append([mixed[1][i] for i in order])
            weights.append([noise[i] for i in order])
        flags = self.fold(valid)
        given = None if flags.all() else flags
        self.policy.touch(self.uses, self.fold(positions), given, self.now, self.fold(weights).float())

    def flag(self, share: float, spare: int, name: str) -> torch.Tensor:
        """Set a flag on some slots of every set, on all but `spare` at most."""
        for one in self.sets:
            n = min(int(share * len(one.slots)), len(one.slots) - spare)
            chosen = self.rng.sample(range(len(one.slots)), max(0, n))
            for i, slot in enumerate(one.slots):
                setattr(slot, name, i in chosen)
        return self.fold([[getattr(s, name) for s in one.slots] for one in self.sets])

    def evict(self, n: int, in_place: bool, share: float) -> None:
        n = min(n, self.births.shape[-1])
        pinned = self.flag(share, n, "pinned")
        garbage = self.flag(self.rng.choice([0, 0, 0.2, 0.6]), 0, "garbage")
        first = garbage if garbage.any() or self.rng.random() < 0.5 else None
        victims = self.policy.choose(self.uses, self.births, n, pinned, first)
        assert victims.shape == (*self.shape, n)
        assert not pinned.gather(-1, victims).any()
        flat = victims.reshape(self.n_sets, n).tolist()
        assert flat == [one.evict(n) for one in self.sets]
        self.n_evicted += n
        for one, gone, mine in zip(self.sets, self.gone, flat, strict=True):
            gone |= {one.slots[i].birth for i in mine}
            assert len(gone) == self.n_evicted, "as many distinct victims as evictions"
        if in_place:
            self.refill(victims, flat, n)
        else:
            self.compact(flat, n)
        self.clock += n

    def refill(self, victims: torch.Tensor, flat: list[list[int]], n: int) -> None:
        self.policy.renew(self.uses, victims, self.now)
        born = torch.arange(self.clock, self.clock + n, dtype=torch.int32).expand_as(victims)
        self.births.scatter_(-1, victims, born)
        for one, mine in zip(self.sets, flat, strict=True):
            for j, i in enumerate(mine):
                one.slots[i] = one.new(self.clock + j, self.now)

    def compact(self, flat: list[list[int]], n: int) -> None:
        kept = self.fold([[i for i in range(self.births.shape[-1]) if i not in mine] for mine in flat]).long()
        old = self.policy.keep(self.uses, kept)
        new = self.policy.start((*self.shape, n), self.now, CPU)
        self.uses = Uses(torch.cat([old.values, new.values], -1), old.hand)
        born = torch.arange(self.clock, self.clock + n, dtype=torch.int32).expand(*self.shape, n)
        self.births = torch.cat([self.births.gather(-1, kept), born], -1)
        for one, mine in zip(self.sets, flat, strict=True):
            one.remove(mine)
            one.slots += [one.new(self.clock + j, self.now) for j in range(n)]

    def compare(self) -> None:
        assert self.uses.values.dtype == self.policy.dtype
        expected = self.fold([[float(s.use) for s in one.slots] for one in self.sets])
        if self.name != "fifo":
            assert torch.equal(self.uses.values.double(), expected.double())
        if self.name == "clock":
            assert self.uses.hand.flatten().tolist() == [one.hand for one in self.sets]


@pytest.mark.parametrize("name", POLICIES)
@given(
    shape=st.sampled_from([(), (1, 1), (2, 3)]), n_slots=st.integers(1, 12), seed=st.integers(0, 10**6),
    evictions=st.lists(st.integers(0, 5), min_size=1, max_size=12), in_place=st.booleans(),
    share=st.sampled_from([0, 0, 0.3, 0.9]),
)  # fmt: skip
def test_victims_are_those_of_the_plain_simulator(
    name: str, shape: tuple[int, ...], n_slots: int, seed: int, evictions: list[int], in_place: bool, share: float
) -> None:
    trace = Trace(name, shape, n_slots, seed)
    for n in evictions:
        for _ in range(trace.rng.randint(0, 3)):
            trace.now += 1
            trace.read(trace.rng.randint(1, 6))
            trace.compare()
        trace.evict(n, in_place, share)
        trace.compare()


def births(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def none(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.bool)


@pytest.mark.parametrize("name", [p for p in POLICIES if p != "clock"])
def test_ties_go_by_birth(name: str) -> None:
    policy = policy_of(name)
    uses = policy.start((5,), 0, CPU)
    born = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
    assert policy.choose(uses, born, 2, none(5)).tolist() == [1, 3]
    far = torch.tensor([2**31 - 1, 2**31 - 2, 7], dtype=torch.int32)
    assert policy.choose(policy.start((3,), 2**31 - 1, CPU), far, 2, none(3)).tolist() == [1, 2]


@pytest.mark.parametrize("name", POLICIES)
def test_garbage_goes_first_and_the_pinned_never(name: str) -> None:
    policy = policy_of(name)
    uses = policy.start((6,), 0, CPU)
    policy.touch(uses, torch.tensor([4, 5]), None, 1, torch.ones(2))
    first, pinned = none(6), none(6)
    first[4:] = True
    pinned[[0, 5]] = True
    assert policy.choose(uses, births(6), 1, pinned, first).tolist() == [4]
    assert policy.choose(uses, births(6), 2, pinned, first).tolist() == [1, 4]
    assert policy.choose(uses, births(6), 4, pinned, first).tolist() == [1, 2, 3, 4]
    assert policy.choose(uses, births(6), 0, pinned, first).tolist() == []


def test_all_counters_of_a_set_are_halved_when_one_is_full() -> None:
    policy = make_policy("counter")
    uses = policy.start((2, 3), 0, CPU)
    both = torch.tensor([[0, 1], [0, 1]])
    for step in range(254):
        policy.touch(uses, both, torch.tensor([[True, step < 100], [step < 7, False]]), step)
    assert uses.values.tolist() == [[254, 100, 0], [7, 0, 0]]
    policy.touch(uses, both, torch.tensor([[True, False], [True, True]]), 254)
    assert uses.values.tolist() == [[127, 50, 0], [8, 1, 0]], "the other set does not saturate"


def test_the_clock_gives_a_second_chance() -> None:
    policy = make_policy("clock")
    uses = policy.start((4,), 0, CPU)
    assert policy.choose(uses, births(4), 1, none(4)).tolist() == [0], "all were just stored: a whole round"
    assert (uses.values.tolist(), uses.hand.item()) == ([0, 0, 0, 0], 1)
    policy.renew(uses, torch.tensor([0]), 1)
    policy.touch(uses, torch.tensor([1]), None, 1)
    assert policy.choose(uses, births(4), 2, none(4)).tolist() == [2, 3]
    assert (uses.values.tolist(), uses.hand.item()) == ([1, 0, 0, 0], 0)
    kept = policy.keep(uses, torch.tensor([0, 1]))
    assert (kept.values.tolist(), kept.hand.item()) == ([1, 0], 0)
    kept = policy.keep(Uses(uses.values, torch.tensor(3)), torch.tensor([0, 2, 3]))
    assert kept.hand.item() == 2, "the hand stands before the slot that it stood before"
    assert policy.keep(kept, torch.tensor([0, 1])).hand.item() == 0
    assert policy.keep(kept, torch.tensor([], dtype=torch.int64)).hand.item() == 0


def test_attention_mass_fades() -> None:
    policy = make_policy("score")
    uses = policy.start((3,), 0, CPU)
    policy.touch(uses, torch.tensor([0, 1]), None, 1, torch.tensor([0.5, 0.1]))
    for step in range(2, 30):
        policy.touch(uses, torch.tensor([1]), None, step, torch.tensor([0.1]))
    assert uses.values[0].item() == pytest.approx(0.5 * 0.9**28)
    assert policy.choose(uses, births(3), 2, none(3)).tolist() == [0, 2], "old mass counts for less than fresh"


@pytest.mark.parametrize("name", POLICIES)
def test_one_head_does_not_decide_for_another(name: str) -> None:
    def victims(other: int) -> torch.Tensor:
        policy = policy_of(name)
        uses = policy.start((2, 2, 8), 0, CPU)
        rng, noise = random.Random(1), random.Random(other)
        chosen = []
        for step in range(1, 12):
            rows = [rng.sample(range(8), 3) for _ in range(3)] + [noise.sample(range(8), 3)]
            valid = torch.tensor([[True, True, rng.random() < 0.5]] * 3 + [[True, noise.random() < 0.5, True]])
            policy.touch(uses, torch.tensor(rows).view(2, 2, 3), valid.view(2, 2, 3), step, torch.ones(2, 2, 3))
            chosen.append(policy.choose(uses, births(8).expand(2, 2, 8), 3, none(8).expand(2, 2, 8)))
        return torch.stack(chosen).flatten(1, 2)

    one, two = victims(2), victims(3)
    assert torch.equal(one[:, :3], two[:, :3])
    assert name == "fifo" or not torch.equal(one[:, 3], two[:, 3])


@pytest.mark.parametrize("name", POLICIES)
def test_usage_may_be_a_view_of_growing_rows(name: str) -> None:
    policy = policy_of(name)
    plain = policy.start((2, 6), 0, CPU)
    wide = torch.zeros(2, 9, 1, dtype=policy.dtype)
    wide[:, :6, 0] = plain.values
    held = Uses(wide[:, :6, 0], plain.hand.clone())
    for uses in (plain, held):
        policy.touch(uses, torch.tensor([[0, 5], [2, 3]]), None, 1, torch.rand(2, 2).fill_(0.5))
    args = (births(6).expand(2, 6), 3, none(6).expand(2, 6))
    assert torch.equal(policy.choose(plain, *args), policy.choose(held, *args))
    assert torch.equal(plain.values, wide[:, :6, 0])
    assert not wide[:, 6:].any()


def test_an_unknown_policy_is_refused() -> None:
    assert POLICIES == ("fifo", "lru", "counter", "clock", "score")
    with pytest.raises(ConfigError, match="expected one of fifo, lru, counter, clock, score, got 'random'"):
        make_policy("random")
