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
from farkv.kernels.ways import Drawn, Varied
from farkv.math.logits import Logits
from farkv.math.sampling import make_seeds, sample_top
from farkv.math.score import pool_group, project_query, score_index
from farkv.math.select import force_sinks, select_above, select_rest, select_top
from farkv.math.tables import decode_nibbles

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
    """`nibbles` code groups of `width` columns, `stages` of them one after the other."""

    batch: int
    heads: int
    group: int
    dim: int
    nibbles: int
    n: int
    width: int = 1
    stages: int = 1

    @property
    def columns(self) -> int:
        return self.nibbles // self.stages * self.width


class Case(NamedTuple):
    q: Tensor
    index: IndexView
    logits: Logits
    masses: Tensor  # float64 [B, Hkv, n]


def make_case(shape: Shape, spread: float = 3.0, softcap: float | None = None, seed: int = 0) -> Case:
    """Codes in a wider pool whose estimated logits have about this spread."""
    b, h, g, d, nibbles, n, width, _ = shape
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (b, h, n + 3, nibbles // 2), generator=random, dtype=torch.int8)
    tables = torch.randn(b, h, 16 * nibbles, width, generator=random)
    side = torch.randn(b if seed % 2 else 1, h, d, shape.columns, generator=random)
    q = torch.randn(b, h * g, 1, d, generator=random)
    logits = Logits(spread / math.sqrt(d * nibbles * width), softcap)
    index = IndexView(codes[:, :, :n], side, tables)
    return Case(q, index, logits, weigh(q, index, logits))


def weigh(q: Tensor, index: IndexView, logits: Logits) -> Tensor:
    """Each record's mass, summed over the group: nibble by nibble, in float64."""
    codes, side, tables = index
    b, h, n, width = codes.shape
    whole = codes.view(torch.uint8).long()
    projected = q.double().reshape(b, h, -1, q.shape[-1]) @ side.double() * logits.scaling
    groups = side.shape[-1] // tables.shape[-1]
    scores = torch.zeros(b, h, projected.shape[2], n, dtype=torch.float64)
    for i in range(2 * width):
        value = whole[..., i] & 15 if i < width else whole[..., i - width] >> 4
        entries = tables[:, :, 16 * i : 16 * i + 16].double()
        part = projected.unflatten(-1, (groups, -1))[..., i % groups, :] @ entries.mT
        scores += part.gather(-1, value[:, :, None].expand(-1, -1, projected.shape[2], -1))
    return logits.cap(scores).softmax(-1).sum(2)


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
    Shape(1, 1, 1, 20, 10, 1),
    Shape(2, 3, 3, 20, 10, 301),  # five bytes of codes
    Shape(1, 2, 4, 64, 32, 9000),  # sampled and, where it pays, scanned coarsely
    Shape(1, 2, 3, 64, 16, 9000, 8, 4),  # learned tables: rows of one piece, read in place
    Shape(1, 1, 4, 128, 32, 6000, 8, 4),
    Shape(1, 2, 3, 64, 16, 9000, 64, 16),  # tables wider than vectors
    Shape(1, 1, 6, 128, 32, 6000, 64, 16),
    Shape(1, 1, 8, 16, 6, 6000, 2),
    Shape(2, 1, 5, 64, 66, 4500, 4, 2),  # a piece of 16 bytes, and more
    Shape(1, 3, 2, 64, 64, 5001),
    Shape(1, 1, 9, 16, 24, 4300),  # twelve bytes; more queries than one vector has
    Shape(1, 1, 1, 16, 600, 4300),  # more nibbles than sums of 16 bits have room for
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_takes_the_heaviest(kernels: Native, shape: Shape, spread: float) -> None:
    case = make_case(shape, spread)
    for cap in {1, max(1, shape.n // 20), (shape.n + 1) // 2, shape.n}:
        check(case, kernels.select(case.q, case.index, case.logits, cap=cap, n=shape.n), cap)


@given(
    shape=st.builds(
        lambda b, h, g, d, groups, n, width, stages: Shape(b, h, g, d, 2 * groups * stages, n, width, 2 * stages),
        st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 12),
        st.sampled_from([1, 2, 63, 64, 65, 500, 4300, 7001]), st.sampled_from([1, 2, 8, 16, 48]), st.integers(1, 2),
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
    case = make_case(Shape(2, 2, 4, 32, 32, 5000, 8, 4))
    index = case.index
    projected = project_query(case.q, index.query, case.logits)
    keys = decode_nibbles(index.codes, index.tables, index.query.shape[-1])
    pooled = pool_group(score_index(projected, keys, case.logits), None)
    first = select_top(force_sinks(pooled.clone(), 4, None), 250)
    chosen = kernels.select(case.q, case.index, case.logits, cap=250, n=5000, sinks=4)
    rest = select_rest(pooled.clone(), first, 50).positions
    more = kernels.select(case.q, case.index, case.logits, cap=50, n=5000, taken=first.positions)
    for mine, theirs in ((chosen, first.positions), (more, rest)):
        both = torch.zeros(2, 2, 5000).scatter(-1, mine, 1.0).gather(-1, theirs).mean()
        # Where weights are closer than the tolerance, each may take its own.
        assert both > 0.98


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("share", [0.003, 0.05, 0.6])
def test_a_varied_choice_is_what_reaches_the_threshold(kernels: Native, shape: Shape, share: float) -> None:
    """Each sequence has its own cap and threshold; a head takes what reaches it, up to the cap."""
    case = make_case(shape)
    means = case.masses / shape.group
    least = means.flatten(1).kthvalue(max(1, int((1 - share) * means[0].numel())), -1).values.float()
    caps = torch.tensor([max(1, shape.n // 4), shape.n][: shape.batch])
    heads = (shape.batch, shape.heads)
    fewest = caps // 8
    varied = Varied(caps, least, fewest, torch.zeros(heads, dtype=torch.int64), torch.zeros(heads))
    cap = int(caps.max())
    out = kernels.select(case.q, case.index, case.logits, cap=cap, n=shape.n, sinks=1, varied=varied)
    none = torch.zeros(shape.batch, dtype=torch.int64)
    plain = select_above(force_sinks(means.float().log(), 1, None), caps, fewest, least, none)
    for b, h in torch.cartesian_prod(*map(torch.arange, heads)).tolist():
        n, mass = int(varied.counts[b, h]), means[b, h]
        chosen = out[b, h, :n]
        assert 1 <= n <= caps[b] and (chosen[1:] > chosen[:-1]).all() and chosen[0] == 0
        left = mass.clone()
        left[chosen] = 0
        rest = mass[chosen[1:]]
        assert n <= max(1, int(fewest[b])) or (rest >= least[b] * (1 - TOLERANCE)).all()
        assert n == caps[b] or left.max() <= least[b] * (1 + TOLERANCE)
        assert n not in (caps[b], fewest[b]) or n == 1 or rest.min() >= left.max() * (1 - TOLERANCE)
        near = ((mass / least[b] - 1).abs() < 2 * TOLERANCE).sum()
        assert abs(n - int(plain.counts[b, h])) <= near
        if n > 1 and int(plain.counts[b, h]) == n:
            # The kernel's lies between the least chosen and the best left out.
            assert left.max() * (1 - TOLERANCE) <= varied.floors[b, h] <= rest.min() * (1 + TOLERANCE)
            assert n <= fewest[b] or plain.floors[b, h] >= least[b] * (1 - TOLERANCE)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_do_not_change_the_choice(kernels: Native, threads: int) -> None:
    case = make_case(Shape(1, 1, 3, 32, 32, 9001))
    torch.set_num_threads(1)
    alone = kernels.select(case.q, case.index, case.logits, cap=450, n=9001)
    torch.set_num_threads(threads)
    assert torch.equal(kernels.select(case.q, case.index, case.logits, cap=450, n=9001), alone)


def test_a_sample_that_misleads_costs_time_alone(kernels: Native) -> None:
    """Heavy records where no sample looks, for one query of the group: guesses and bound are wrong."""
    shape = Shape(1, 1, 2, 16, 32, 9000)
    case = make_case(shape, 1.0)
    heavy = torch.tensor([50, 51, 3333, 6000])
    projected = case.q[0, 0, 0] @ case.index.query[0, 0]
    added = projected[:, None] * case.index.tables[0, 0, :, 0].view(32, 16)
    codes = case.index.codes.view(torch.uint8).clone()
    for rows, best in ((heavy, added.argmax(-1)), (torch.arange(1000, 1400), added.argmin(-1))):
        codes[0, 0, rows] = (best[:16] | best[16:] << 4).to(torch.uint8)
    index = case.index._replace(codes=codes.view(torch.int8))
    for spread in (1.0, 30.0, 1000.0):
        logits = Logits(spread / math.sqrt(16 * 32))
        chosen = kernels.select(case.q, index, logits, cap=450, n=9000)
        check(Case(case.q, index, logits, weigh(case.q, index, logits)), chosen, 450)
        assert set(heavy.tolist()) <= set(chosen[0, 0].tolist())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_queries_without_a_direction_still_choose(kernels: Native, value: float) -> None:
    case = make_case(Shape(1, 1, 2, 16, 32, 9000))
    chosen = kernels.select(torch.full_like(case.q, value), case.index, case.logits, cap=300, n=9000, sinks=4)
    assert chosen.shape == (1, 1, 300)
    assert (chosen[..., 1:] > chosen[..., :-1]).all() and chosen.min() == 0 and chosen.max() < 9000


def test_operands_that_do_not_fit_are_refused(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 2, 16, 32, 100))
    wrong = [
        (case.q, case.index, {"cap": 101, "n": 100}),
        (case.q, case.index, {"cap": 5, "n": 101}),
        (case.q, case.index, {"cap": 60, "n": 100, "taken": torch.zeros(1, 2, 41, dtype=torch.int64)}),
        (case.q, case.index._replace(tables=case.index.tables[:, :, 1:]), {"cap": 5, "n": 100}),
        (case.q, case.index._replace(codes=case.index.codes.int()), {"cap": 5, "n": 100}),
        (case.q[..., :8], case.index, {"cap": 5, "n": 100}),
    ]
    for q, index, numbers in wrong:
        with pytest.raises(CacheStateError, match="expected"):
            kernels.select(q, index, case.logits, **numbers)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_draws_what_plain_operations_draw(kernels: Native, shape: Shape, spread: float) -> None:
    case = make_case(shape, spread)
    seeds = make_seeds(3, [shape.n] * shape.batch, torch.ones(1, shape.heads, dtype=torch.bool))
    if shape.heads > 1:
        seeds[0, 0] = -1
    for cap in {max(1, shape.n // 20), (shape.n + 1) // 2, shape.n}:
        sinks = min(3, cap)
        drawn = Drawn(seeds, torch.full((shape.batch, shape.heads, cap), 99.0))
        chosen = kernels.select(case.q, case.index, case.logits, cap=cap, n=shape.n, sinks=sinks, drawn=drawn)
        log_weights = (case.masses / shape.group).log().float()
        plain = sample_top(force_sinks(log_weights, sinks, None), cap, seeds)
        assert plain.odds is not None
        ours = torch.zeros(*seeds.shape, shape.n).scatter(-1, chosen, drawn.odds + 1)
        theirs = torch.zeros(*seeds.shape, shape.n).scatter(-1, plain.positions, plain.odds + 1)
        both = (ours > 0) & (theirs > 0)
        # Ranks that differ by a rounding may change places; the threshold moves by no more.
        assert (both.sum(-1) >= cap - 1 - cap // 50).all()
        assert (ours - theirs).abs()[both].max() < 4 * TOLERANCE
        assert chosen.diff(dim=-1).min() > 0 if cap > 1 else True


def test_seeds_stand_alone(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 2, 16, 8, 100))
    drawn = Drawn(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 10))
    taken = torch.zeros(1, 2, 1, dtype=torch.int64)
    with pytest.raises(CacheStateError, match="expected one of a varied, a drawn and a paged choice"):
        kernels.select(case.q, case.index, case.logits, cap=10, n=100, taken=taken, drawn=drawn)
    for wrong in (drawn._replace(seeds=drawn.seeds.int()), drawn._replace(odds=torch.zeros(1, 2, 9))):
        with pytest.raises(CacheStateError, match="contiguous"):
            kernels.select(case.q, case.index, case.logits, cap=10, n=100, drawn=wrong)
