"""The native choice against group masses in float64: exactly the cap, in order, nothing better left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farkv.errors import CacheStateError
from farkv.kernels.native import IndexView, Native, list_native
from farkv.math.logits import Logits
from farkv.math.score import pool_group, project_query, score_index, unpack_codes
from farkv.math.select import force_sinks, select_rest, select_top

# What the kernel promises: weights that differ by less may change places, and so may weights far below the largest.
TOLERANCE, FAINT = 2.0**-7, 2.0**-120

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")


@pytest.fixture(params=list_native() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Shape(NamedTuple):
    batch: int
    heads: int
    group: int
    dim: int
    columns: int
    n: int
    bits: int


class Case(NamedTuple):
    q: Tensor
    index: IndexView
    logits: Logits
    masses: Tensor  # float64 [B, Hkv, n]


def make_case(shape: Shape, spread: float = 3.0, softcap: float | None = None, seed: int = 0) -> Case:
    """Codes in a wider pool whose estimated logits have about this spread."""
    b, h, g, d, r, n, bits = shape
    random = torch.Generator().manual_seed(seed)
    top = 7 if bits == 4 else 127
    codes = (torch.randn(b, h, n + 3, r, generator=random) * top / 2.5).round().clamp(-top - 1, top).to(torch.int8)
    packed = codes if bits == 8 else (codes[..., : r // 2] & 15) | (codes[..., r // 2 :] << 4)
    side = torch.randn(b if seed % 2 else 1, h, d, r, generator=random)
    scale = (0.5 + torch.rand(b, h, 1, r, generator=random)) * 2.5 / top
    q = torch.randn(b, h * g, 1, d, generator=random)
    logits = Logits(spread / math.sqrt(d * r), softcap)
    index = IndexView(packed[:, :, :n], bits, side, scale)
    projected = (q.double().reshape(b, h, g, d) @ side.double()) * scale.double() * logits.scaling
    scores = projected @ codes[:, :, :n].double().mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return Case(q, index, logits, scores.softmax(-1).sum(2))


def check(case: Case, chosen: Tensor, cap: int, sinks: int = 0, taken: Tensor | None = None) -> None:
    masses = case.masses.clone()
    n = masses.shape[-1]
    assert chosen.shape == (*masses.shape[:2], cap) and chosen.dtype == torch.int64
    if cap == 0:
        return
    assert (chosen[..., 1:] > chosen[..., :-1]).all()
    assert chosen[..., 0].min() >= 0 and chosen[..., -1].max() < n
    marks = torch.zeros(masses.shape, dtype=torch.bool).scatter(-1, chosen, True)
    free = torch.ones_like(marks)
    if taken is not None:
        assert not marks.gather(-1, taken).any()
        free.scatter_(-1, taken, False)
    assert (marks | ~free)[..., : min(sinks, cap)].all()
    free[..., :sinks] = False
    worst = masses.where(free & marks, torch.inf).amin(-1)
    best = masses.where(free & ~marks, 0.0).amax(-1)
    assert (worst >= best * (1 - TOLERANCE)).where(best > FAINT, True).all()


SHAPES = [
    Shape(1, 1, 1, 20, 10, 1, 4),
    Shape(2, 3, 3, 20, 10, 301, 4),  # five bytes of codes
    Shape(1, 2, 4, 64, 32, 9000, 4),  # sampled and, where it pays, scanned coarsely
    Shape(1, 1, 8, 16, 5, 6000, 8),
    Shape(2, 1, 5, 64, 33, 4500, 8),
    Shape(1, 3, 2, 64, 64, 5001, 4),  # more than one piece of a row
    Shape(1, 1, 8, 16, 32, 4300, 4),  # scanned in registers: 8, 2, 1 queries of a group
    Shape(1, 2, 2, 16, 28, 4400, 4),  # rows that end before a piece does
    Shape(1, 1, 1, 16, 32, 6000, 4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_takes_the_heaviest(kernels: Native, shape: Shape, spread: float) -> None:
    case = make_case(shape, spread)
    for cap in {1, max(1, shape.n // 20), (shape.n + 1) // 2, shape.n}:
        check(case, kernels.select(case.q, case.index, case.logits, cap=cap, n=shape.n), cap)


@given(
    shape=st.builds(
        Shape, st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40),
        st.integers(1, 20).map(lambda half: 2 * half),
        st.sampled_from([1, 2, 63, 64, 65, 500, 4300, 7001]), st.sampled_from([4, 8]),
    ),
    seed=st.integers(0, 10**6), share=st.floats(0, 1), sinks=st.integers(0, 6), n_taken=st.integers(0, 60),
    softcap=st.sampled_from([None, 5.0]), isa=st.sampled_from(list_native() or ("none",)),
)  # fmt: skip
@settings(max_examples=60)
def test_keeps_its_promise(
    shape: Shape, seed: int, share: float, sinks: int, n_taken: int, softcap: float | None, isa: str
) -> None:
    case = make_case(shape, 3.0, softcap, seed)
    n_taken = min(n_taken, shape.n - 1)
    picks = [torch.randperm(shape.n)[:n_taken].sort().values for _ in range(shape.batch * shape.heads)]
    taken = torch.stack(picks).view(shape.batch, shape.heads, n_taken)
    cap = int(share * (shape.n - n_taken))
    choices = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        choices.append(
            Native(isa).select(case.q, case.index, case.logits, cap=cap, n=shape.n, sinks=sinks, taken=taken)
        )
    check(case, choices[0], cap, sinks, taken)
    assert torch.equal(*choices)


def test_agrees_with_the_plain_twin(kernels: Native) -> None:
    case = make_case(Shape(2, 2, 4, 32, 32, 5000, 4))
    projected = project_query(case.q, case.index.query, case.index.scale, case.logits)
    pooled = pool_group(score_index(projected, unpack_codes(case.index.codes), case.logits), None)
    first = select_top(force_sinks(pooled.clone(), 4, None), 250)
    chosen = kernels.select(case.q, case.index, case.logits, cap=250, n=5000, sinks=4)
    rest = select_rest(pooled.clone(), first, 50).positions
    more = kernels.select(case.q, case.index, case.logits, cap=50, n=5000, taken=first.positions)
    for mine, theirs in ((chosen, first.positions), (more, rest)):
        both = torch.zeros(2, 2, 5000).scatter(-1, mine, 1.0).gather(-1, theirs).mean()
        # Where weights are closer than the tolerance, each may take its own.
        assert both > 0.98


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_do_not_change_the_choice(kernels: Native, threads: int) -> None:
    case = make_case(Shape(1, 1, 3, 32, 32, 9001, 4))
    torch.set_num_threads(1)
    alone = kernels.select(case.q, case.index, case.logits, cap=450, n=9001)
    torch.set_num_threads(threads)
    assert torch.equal(kernels.select(case.q, case.index, case.logits, cap=450, n=9001), alone)


def test_a_sample_that_misleads_costs_time_alone(kernels: Native) -> None:
    """Heavy records where no sample looks, for one query of the group: guesses and bound are wrong."""
    shape = Shape(1, 1, 2, 16, 32, 9000, 4)
    case = make_case(shape, 1.0)
    codes = unpack_codes(case.index.codes).clone()
    heavy = torch.tensor([50, 51, 3333, 6000])
    direction = torch.sign((case.q[0, 0, 0] @ case.index.query[0, 0]) * case.index.scale[0, 0, 0])
    codes[0, 0, heavy] = (7 * direction).to(torch.int8)
    codes[0, 0, 1000:1400] = -codes[0, 0, heavy[:1]]
    packed = (codes[..., :16] & 15) | (codes[..., 16:] << 4)
    for spread in (1.0, 30.0, 1000.0):
        logits = Logits(spread / math.sqrt(16 * 32))
        projected = (
            (case.q.double().reshape(1, 1, 2, 16) @ case.index.query.double()) * case.index.scale * logits.scaling
        )
        masses = (projected @ codes.double().mT).softmax(-1).sum(2)
        index = case.index._replace(codes=packed)
        chosen = kernels.select(case.q, index, logits, cap=450, n=9000)
        check(Case(case.q, index, logits, masses), chosen, 450)
        assert set(heavy.tolist()) <= set(chosen[0, 0].tolist())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_queries_without_a_direction_still_choose(kernels: Native, value: float) -> None:
    case = make_case(Shape(1, 1, 2, 16, 32, 9000, 4))
    chosen = kernels.select(torch.full_like(case.q, value), case.index, case.logits, cap=300, n=9000, sinks=4)
    assert chosen.shape == (1, 1, 300)
    assert (chosen[..., 1:] > chosen[..., :-1]).all() and chosen.min() == 0 and chosen.max() < 9000


def test_operands_that_do_not_fit_are_refused(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 2, 16, 32, 100, 4))
    wrong = [
        (case.q, case.index, {"cap": 101, "n": 100}),
        (case.q, case.index, {"cap": 5, "n": 101}),
        (case.q, case.index, {"cap": 60, "n": 100, "taken": torch.zeros(1, 2, 41, dtype=torch.int64)}),
        (case.q, case.index._replace(bits=8), {"cap": 5, "n": 100}),
        (case.q, case.index._replace(codes=case.index.codes.int()), {"cap": 5, "n": 100}),
        (case.q[..., :8], case.index, {"cap": 5, "n": 100}),
    ]
    for q, index, numbers in wrong:
        with pytest.raises(CacheStateError, match="expected"):
            kernels.select(q, index, case.logits, **numbers)
