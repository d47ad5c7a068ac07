"""The bank: what fixed counts would have read is never exceeded, however uneven the layers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farkv
from farkv.engine.bank import RESERVE, Bank
from farkv.methods import InfiniGen
from farkv.store.follow import Cropped
from tests.models import forward, make_model, make_prompt

COUNT, NEWEST, BURST = 40, 3, 4.0


def play(bank: Bank, wanted: list[list[float]], first: int = 100) -> list[list[int]]:
    """Let every layer of every step read what it wants (weights at COUNT places), as far as the bank allows."""
    steps: list[list[int]] = []
    for t, layers in enumerate(wanted):
        read: list[int] = []
        for layer, sharp in enumerate(layers):
            terms = bank.lend(layer, first + t, [COUNT], [NEWEST])
            # Weights fall as a power of their rank.
            weights = [0.5 * sharp * (rank + 1) ** -1.2 for rank in range(1000)]
            n = sum(weight >= terms.least[0] for weight in weights)
            n = min(terms.caps[0], max(terms.fewest[0], n))
            bank.note([COUNT], [n], [[weights[max(0, n - 1)]]], [NEWEST])
            read.append(n + NEWEST)
        steps.append(read)
    return steps


@given(
    st.lists(st.lists(st.floats(1e-4, 1.0), min_size=6, max_size=6), min_size=1, max_size=40),
)
@settings(max_examples=60)
def test_reads_stay_within_what_fixed_counts_would_read(wanted: list[list[float]]) -> None:
    steps = play(Bank(BURST, list(range(6))), wanted)
    spent = 0
    for t, read in enumerate(steps):
        spent += sum(read)
        assert spent <= (t + 1) * 6 * (COUNT + NEWEST)
        assert all(int(RESERVE * (COUNT + NEWEST)) <= n <= BURST * COUNT + NEWEST for n in read)


def test_flat_layers_read_more_and_nearly_all_is_spent() -> None:
    steps = play(Bank(BURST, list(range(6))), [[1.0, 0.01, 0.01, 1.0, 0.01, 0.01]] * 100)
    later = steps[20:]
    assert min(read[0] for read in later) > 1.5 * max(read[1] for read in later)
    spent = sum(map(sum, steps)) / (100 * 6 * (COUNT + NEWEST))
    assert spent > 0.97


def test_tokens_are_taken_back() -> None:
    wanted = [[0.5, 0.02 * (t + 1), 0.1] for t in range(12)]
    bank, again = Bank(BURST, [0, 1, 2]), Bank(BURST, [0, 1, 2])
    whole = play(bank, wanted)
    play(again, [*wanted[:7], [0.9, 0.9, 0.9], [0.001, 0.5, 0.1]])
    again.crop(Cropped(107, 107))
    assert play(again, wanted[7:], first=107) == whole[7:]


@pytest.mark.parametrize("fraction", [0.05, 0.2])
@pytest.mark.parametrize("kernel", ["plain", None])
def test_the_receipt_keeps_the_promise(fraction: float, kernel: Any) -> None:
    model, ids = make_model("llama"), make_prompt(2, tokens=260)["input_ids"]
    options: Any = {} if kernel is None else {"kernel": kernel}
    with farkv.attach(model, InfiniGen(fraction=fraction, burst=3), **options) as far, torch.no_grad():
        cache = far.new_cache()
        forward(model, ids[:, :220], cache)
        for t in range(220, 260):
            forward(model, ids[:, t : t + 1], cache)
        receipt = far.receipt()
    assert 0.9 * fraction < receipt.read_fraction <= fraction
    assert receipt.read_fraction <= receipt.peak_read_fraction <= 3 * fraction
