"""The GPU's choice against the plain twin's order, in float64."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch

from farkv.errors import CacheStateError
from farkv.kernels.native import IndexView
from farkv.math.logits import Logits
from farkv.math.tables import decode_nibbles
from tests.kernels.gpu_interpreter import DEVICE, GPU, LARGER, MARKS

pytestmark = MARKS
# Weights that differ by less may be chosen either way; so may those so small that their log2 is no longer told apart.
NEAR_TIE, NEAR_LOG = 2.0**-7, 2.0**-15


class Case(NamedTuple):
    """One layer's sizes; `spread` says how far logits lie apart."""

    bits: int = 8
    batch: int = 1
    group: int = 1
    columns: int = 8
    n: int = 100
    cap: int = 17
    sinks: int = 0
    n_taken: int = 0
    softcap: float | None = None
    shared: bool = True
    spread: float = 1.0
    dtype: torch.dtype = torch.float32


def make_index(case: Case, kv_heads: int = 2, dim: int = 20) -> tuple[torch.Tensor, IndexView]:
    n, width = case.n * LARGER, case.columns * case.bits // 8
    codes = torch.randint(-128, 128, (case.batch, kv_heads, n + 37, width), dtype=torch.int8)[:, :, :n]
    query = torch.randn(1 if case.shared else case.batch, kv_heads, dim, case.columns)
    # Of eight bits two nibbles code a column; of four, each nibble codes two of a group's eight columns.
    wide = 1 if case.bits == 8 or case.columns % 8 else 2
    tables = torch.randn(case.batch, kv_heads, 32 * width, wide) * 0.3 * case.spread
    q = torch.randn(case.batch, kv_heads * case.group, 1, dim).to(case.dtype)
    return q.to(DEVICE), IndexView(codes.to(DEVICE), query.to(DEVICE), tables.to(DEVICE))


def weigh(q: torch.Tensor, index: IndexView, logits: Logits, n: int) -> torch.Tensor:
    """log2 of the group's mass, in float64."""
    codes = index.codes[:, :, :n]
    keys = decode_nibbles(codes, index.tables, index.query.shape[-1]).double()
    batch, kv_heads = codes.shape[:2]
    grouped = q.double().reshape(batch, kv_heads, -1, q.shape[-1])
    scores = grouped @ index.query.double() * logits.scaling @ keys.mT
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    return scores.log_softmax(-1).logsumexp(2) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def assert_best(chosen: torch.Tensor, mass: torch.Tensor, sinks: int, taken: torch.Tensor | None) -> None:
    n = mass.shape[-1]
    assert chosen.dtype == torch.int64
    assert (chosen[..., 1:] > chosen[..., :-1]).all()
    assert int(chosen.min()) >= 0 and int(chosen.max()) < n
    marks = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen, value=True)
    barred = torch.zeros_like(marks)
    if taken is not None:
        barred.scatter_(-1, taken, value=True)
    assert not (marks & barred).any()
    first = torch.arange(n, device=mass.device).expand_as(mass) < sinks
    assert (marks | barred | ~first).all()
    free = ~first & ~barred
    worst = mass.masked_fill(~(marks & free), torch.inf).amin(-1)
    missed = mass.masked_fill(marks | ~free, -torch.inf).amax(-1)
    assert (missed <= worst + NEAR_TIE + NEAR_LOG * worst.abs().nan_to_num(posinf=0)).all()


CASES = {
    "plain": Case(),
    "one of one": Case(n=1, cap=1) if LARGER == 1 else Case(cap=1),
    "all": Case(n=61, cap=61 * LARGER),
    "group of 3, odd columns": Case(group=3, columns=6, n=129),
    "group of 4, batch, own queries": Case(group=4, batch=2, n=65, shared=False),
    "packed": Case(bits=4, columns=12, group=3, n=90, cap=30),
    "packed, one column pair": Case(bits=4, columns=2, n=70),
    "sinks": Case(sinks=4, spread=3.0),
    "sinks fill the cap": Case(sinks=17, n=70),
    "taken": Case(n_taken=9, sinks=2, group=2),
    "taken leaves the cap": Case(n=40, cap=30 * LARGER, n_taken=10 * LARGER),
    "softcap": Case(softcap=2.0, spread=8.0, group=2),
    "float32 has no such weights": Case(spread=300.0),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16, group=2, bits=4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_records_of_the_largest_mass_are_chosen(name: str) -> None:
    case = CASES[name]
    q, index = make_index(case)
    n, logits = index.codes.shape[2], Logits(0.3, case.softcap)
    taken = None
    if case.n_taken:
        heads = torch.rand(case.batch, 2, n, device=DEVICE)
        taken = heads.argsort(-1)[..., : case.n_taken]
    chosen = GPU.select(q, index, logits, cap=case.cap, n=n, sinks=case.sinks, taken=taken)
    assert chosen.shape == (case.batch, 2, case.cap)
    assert_best(chosen, weigh(q, index, logits, n), case.sinks, taken)


def test_equal_weights_go_to_the_lowest_positions_and_twice_taken_counts_once() -> None:
    q, index = make_index(Case(n=150))
    index.codes.zero_()
    n = index.codes.shape[2]
    taken = torch.tensor([3, 1, 3, 70], device=DEVICE).expand(1, 2, 4)
    chosen = GPU.select(q, index, Logits(1.0), cap=100, n=n, taken=taken)
    expected = [s for s in range(103) if s not in (1, 3, 70)]
    assert chosen.tolist() == [[expected, expected]]


def test_a_count_on_the_device_bounds_what_is_chosen() -> None:
    q, index = make_index(Case(n=150, group=2))
    held = 70 * LARGER
    n = torch.tensor(held, dtype=torch.int32, device=DEVICE)
    taken = torch.tensor([2, 7], device=DEVICE).expand(1, 2, 2)
    on_device = GPU.select(q, index, Logits(0.3), cap=20, n=n, sinks=1, taken=taken)
    assert torch.equal(on_device, GPU.select(q, index, Logits(0.3), cap=20, n=held, sinks=1, taken=taken))
    assert_best(on_device, weigh(q, index, Logits(0.3), held), 1, taken)


def test_scratch_stays_while_the_context_grows() -> None:
    q, index = make_index(Case(n=120))
    room = index._replace(codes=index.codes[:, :, :80])
    GPU.select(q, room, Logits(0.3), cap=5, n=70)
    areas = {name: area.data_ptr() for name, area in GPU._scratch.items()}
    GPU.select(q, index, Logits(0.3), cap=5, n=index.codes.shape[2])
    assert {name: GPU._scratch[name].data_ptr() for name in areas} == areas


@pytest.mark.parametrize(
    "ask", [dict(cap=0, n=50), dict(cap=51, n=50), dict(cap=49, n=50, taken=2), dict(cap=1, n=10**6)], ids=str
)
def test_a_cap_beyond_the_open_records_is_refused(ask: dict[str, Any]) -> None:
    q, index = make_index(Case())
    if "taken" in ask:
        ask = ask | {"taken": torch.tensor([1, 2], device=DEVICE).expand(1, 2, 2)}
    with pytest.raises(CacheStateError, match="choose fewer"):
        GPU.select(q, index, Logits(0.3), **ask)


@pytest.mark.gpu
def test_a_choice_is_captured_in_a_graph_and_follows_the_growing_context() -> None:
    q, index = make_index(Case(group=4, n=400))
    n = torch.tensor(9000, dtype=torch.int32, device=DEVICE)
    GPU.select(q, index, Logits(0.3), cap=500, n=n, sinks=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = GPU.select(q, index, Logits(0.3), cap=500, n=n, sinks=4)
    for held in (9001, 20000, index.codes.shape[2]):
        n.fill_(held)
        q.normal_()
        graph.replay()
        assert_best(chosen, weigh(q, index, Logits(0.3), held), 4, None)


def test_taken_positions_of_other_heads_are_refused() -> None:
    q, index = make_index(Case(batch=1))
    for taken in (torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 2, 3)):
        with pytest.raises(CacheStateError, match="expected taken that are whole numbers"):
            inspect.unwrap(type(GPU).select)(GPU, q, index, Logits(0.3), cap=5, n=100, taken=taken.to(DEVICE))
