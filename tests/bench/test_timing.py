"""Interleaved timing, with a clock that only the runners move."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from farkv.bench import timing
from farkv.bench.timing import divide, measure_interleaved, summarize


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Steady:
    name: str
    clock: Clock
    seconds: float
    log: list[str] = field(default_factory=list)
    n_layers: int = 2
    least_tokens: int = 1
    tokens: int = 0

    def step(self, layer: int) -> None:
        self.tokens += layer == 0
        self.clock.now += self.seconds

    def restore(self) -> None:
        # Not timed, whatever it takes.
        self.clock.now += 100.0
        self.log.append(self.name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_seconds_are_per_layer_and_token(clock: Clock) -> None:
    found = measure_interleaved([Steady("a", clock, 0.01), Steady("b", clock, 0.02)], 4)
    assert found == {"a": pytest.approx([0.01] * 4), "b": pytest.approx([0.02] * 4)}


def test_methods_take_turns_and_another_one_begins_each_time(clock: Clock) -> None:
    log: list[str] = []
    ticks: list[int] = []
    runners = [Steady(name, clock, 0.01, log) for name in "abc"]
    measure_interleaved(runners, 3, advance=lambda: ticks.append(1))
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"
    assert len(ticks) == 3 * (3 + 1)


def test_a_slow_method_takes_part_in_fewer_rounds_but_in_three(clock: Clock) -> None:
    found = measure_interleaved([Steady("fast", clock, 0.001), Steady("slow", clock, 10.0)], 15)
    assert len(found["fast"]) == 15
    assert len(found["slow"]) == 3


def test_a_quick_method_reads_several_tokens_a_round(clock: Clock) -> None:
    quick, least = Steady("quick", clock, 1e-6), Steady("least", clock, 0.04, least_tokens=16)
    measure_interleaved([quick, least], 2)
    assert quick.tokens == 2 + 2 * timing.MOST_TOKENS
    # Its first round shows that it is slow: of two rounds none can be left out.
    assert least.tokens == 2 + 2 * 16


def test_median_and_quartiles() -> None:
    spread = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread == (3.0, 2.0, 4.0, 1.0, 5)
    assert divide(spread, 2) == (1.5, 1.0, 2.0, 0.5, 5)
