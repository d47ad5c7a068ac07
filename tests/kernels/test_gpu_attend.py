"""The GPU's attention against the same sum in float64; the tolerance is what plain torch itself loses in the dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from farkv.errors import CacheStateError
from farkv.kernels.native import Rows
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec
from tests.kernels.gpu_interpreter import DEVICE, GPU, LARGER, MARKS

pytestmark = MARKS


class Case(NamedTuple):
    """One layer's sizes; `chosen` None reads all rows."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    group: int = 1
    k_dim: int = 16
    v_dim: int = 16
    n: int = 50
    chosen: int | None = 21
    tail: int = 3
    counted: bool = False
    softcap: float | None = None
    sinks: bool = False
    form: str = "plain"


def make_rows(case: Case, kv_heads: int = 2) -> tuple[torch.Tensor, Rows, torch.Tensor]:
    """Queries, rows as stored, and the same rows in float64."""
    n = case.n * LARGER
    shape = (case.batch, kv_heads, n + 11)
    k, v = (torch.randn(*shape, dim).to(case.dtype) for dim in (case.k_dim, case.v_dim))
    data = torch.cat([k, v], -1)
    if case.form != "plain":
        codec = Codec(case.form, case.k_dim, case.v_dim, case.dtype)
        stored = codec.encode(k, v)
        data = codec.decode(stored)
    else:
        stored = data
    q = torch.randn(case.batch, kv_heads * case.group, 1, case.k_dim).to(case.dtype)
    rows = Rows(stored.to(DEVICE)[:, :, :n], case.k_dim, case.v_dim, case.form)
    return q.to(DEVICE), rows, data.to(DEVICE)[:, :, :n].double()


def attend_plainly(q: torch.Tensor, kv: torch.Tensor, read: torch.Tensor, case: Case, sinks: Any) -> torch.Tensor:
    """Attention over the rows that `read` marks, in the dtype of `q`."""
    k, v = kv[..., : case.k_dim].to(q.dtype), kv[..., case.k_dim :].to(q.dtype)
    batch, kv_heads = k.shape[:2]
    scores = q.reshape(batch, kv_heads, -1, case.k_dim) @ k.mT * 0.3
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~read[:, :, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(q.dtype).view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).reshape(batch, -1, 1, case.v_dim)


CASES = {
    "chosen": Case(),
    "all": Case(chosen=None, tail=0),
    "one": Case(chosen=1, tail=0),
    "the tail alone": Case(chosen=0, tail=5),
    "group of 3, batch, odd dims": Case(batch=2, group=3, k_dim=20, v_dim=12),
    "group of 4, all, sinks": Case(group=4, chosen=None, tail=0, sinks=True),
    "counts": Case(batch=2, counted=True),
    "counts of rows before a tail": Case(chosen=None, counted=True, tail=4),
    "softcap": Case(softcap=1.5, group=2),
    "bfloat16": Case(dtype=torch.bfloat16, group=2),
    "float16": Case(dtype=torch.float16, group=2, sinks=True),
    "int8": Case(form="int8", k_dim=32, v_dim=32),
    "int8, odd dims, bfloat16": Case(form="int8", k_dim=33, v_dim=5, dtype=torch.bfloat16),
    "int4": Case(form="int4", k_dim=32, v_dim=64, group=2, tail=1),
    "int4, odd dims": Case(form="int4", k_dim=37, v_dim=67, softcap=3.0),
    "int4, float16": Case(form="int4", k_dim=40, v_dim=40, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_same_sum(name: str) -> None:
    case = CASES[name]
    q, rows, kv = make_rows(case)
    n = kv.shape[2]
    heads = torch.rand(case.batch, 2, n - case.tail, device=DEVICE)
    wide = None if case.chosen is None else case.chosen * (LARGER if case.chosen > 1 else 1)
    positions = None if wide is None else heads.argsort(-1)[..., :wide].sort(-1).values
    most = n - case.tail if wide is None else wide
    counts = torch.randint(1, most, (case.batch, 2), device=DEVICE, dtype=torch.int32) if case.counted else None
    listed = torch.arange(n - case.tail, device=DEVICE).expand_as(heads) if positions is None else positions
    counted = torch.arange(most, device=DEVICE) < (most if counts is None else counts[..., None])
    read = torch.zeros(case.batch, 2, n, dtype=torch.bool, device=DEVICE)
    read.scatter_(-1, listed, counted.expand_as(listed).clone())
    read[..., n - case.tail :] = True
    sinks = torch.randn(q.shape[1], device=DEVICE) if case.sinks else None
    out = GPU.attend(
        q, rows, Logits(0.3, case.softcap), positions=positions, n=n, tail=case.tail, sinks=sinks, counts=counts
    )
    assert out.dtype == q.dtype and out.shape == (case.batch, q.shape[1], 1, case.v_dim)
    exact = attend_plainly(q.double(), kv, read, case, sinks)
    noise = float((attend_plainly(q, kv, read, case, sinks).double() - exact).abs().max())
    rounding = torch.finfo(q.dtype).eps * float(exact.abs().max())
    assert float((out.double() - exact).abs().max()) <= 4 * noise + 2 * rounding


def test_a_count_of_rows_on_the_device_is_the_same_as_a_number() -> None:
    case = Case(n=60)
    q, rows, _ = make_rows(case)
    held = 41 * LARGER
    n = torch.tensor(held, dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([0, 3, 30], device=DEVICE).expand(1, 2, 3)
    for at in (None, positions):
        there = GPU.attend(q, rows, Logits(0.3), positions=at, n=n, tail=2)
        assert torch.equal(there, GPU.attend(q, rows, Logits(0.3), positions=at, n=held, tail=2))


def test_queries_of_a_wider_dtype_lose_nothing() -> None:
    case = Case(dtype=torch.bfloat16, chosen=None, tail=0)
    q, rows, kv = make_rows(case)
    q = torch.randn_like(q, dtype=torch.float32)
    out = GPU.attend(q, rows, Logits(0.3), positions=None, n=kv.shape[2])
    read = torch.ones(1, 2, kv.shape[2], dtype=torch.bool, device=DEVICE)
    assert torch.allclose(out.double(), attend_plainly(q.double(), kv, read, case, None), atol=1e-5)


def test_rows_that_no_kernel_reads_are_refused() -> None:
    q, rows, _ = make_rows(Case())
    for wrong in (rows._replace(data=rows.data.double()), rows._replace(form="int3")):
        with pytest.raises(CacheStateError, match="plain path"):
            GPU.attend(q, wrong, Logits(0.3), positions=None, n=5)
    for wrong in (dict(n=rows.data.shape[2] + 1), dict(n=3, tail=4)):
        with pytest.raises(CacheStateError, match="stored records"):
            GPU.attend(q, rows, Logits(0.3), positions=None, **wrong)
    assert GPU.can_read(torch.bfloat16) and not GPU.can_read(torch.float64)


@pytest.mark.gpu
def test_attention_is_captured_in_a_graph() -> None:
    case = Case(dtype=torch.bfloat16, group=4, k_dim=128, v_dim=128, n=100)
    q, rows, kv = make_rows(case)
    positions = torch.arange(0, 3000, 3, device=DEVICE).expand(1, 2, 1000).contiguous()
    ask = dict(positions=positions, n=kv.shape[2], tail=case.tail)
    GPU.attend(q, rows, Logits(0.3), **ask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = GPU.attend(q, rows, Logits(0.3), **ask)
    q.normal_()
    graph.replay()
    assert torch.equal(out, GPU.attend(q, rows, Logits(0.3), **ask))
