"""Choices limited to pages, against the plain twin; a file's pages, against plain system calls and zlib."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farkv.errors import CacheStateError
from farkv.kernels.native import Native, list_native
from farkv.kernels.native_abi import load_library
from farkv.kernels.ways import Paged
from farkv.math.pages import locate
from farkv.math.score import pool_group, project_query, score_index
from farkv.math.select import forbid, force_sinks, limit_pages, select_seen
from farkv.math.tables import decode_nibbles
from tests.kernels.test_native_select import TOLERANCE, Case, Shape, make_case

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")
HEADS = (1, 2)


@pytest.fixture(params=list_native() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


def score(case: Case) -> Tensor:
    """Log weights, mean over the group, of all records."""
    index = case.index
    told = decode_nibbles(index.codes.contiguous(), index.tables, index.query.shape[3])
    return pool_group(score_index(project_query(case.q, index.query, case.logits), told, case.logits), None)


def check_choice(case: Case, paged: Paged, cap: int, n_sinks: int, out: Tensor, taken: Tensor | None = None) -> None:
    """As many as the plain twin chooses, ascending, in reach, none lighter than its lightest by more than rounding."""
    scores = score(case)
    n, lightest = scores.shape[-1], scores.clone()
    reached = limit_pages(force_sinks(scores, n_sinks, None), paged.here, paged.tokens, paged.more)
    if taken is not None:
        reached = reached.scatter(-1, taken, -torch.inf)
    want = select_seen(reached, cap)
    assert want.valid is not None
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            right, got = want.positions[b, h][want.valid[b, h]], out[b, h, : paged.counts[b, h]]
            assert len(got) == len(right)
            assert len(got) == 0 or (int(got.min()) >= 0 and int(got.max()) < n)
            assert (got.diff() > 0).all()
            own, theirs = lightest[b, h, got], lightest[b, h, right]
            forced = got < n_sinks
            assert torch.equal(got[forced], right[right < n_sinks])
            if len(own[~forced]):
                assert own[~forced].min() >= theirs[right >= n_sinks].min() - 4 * TOLERANCE


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_choice_on_pages_is_that_of_the_plain_twin(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(list_native()))
    n, tokens = draw(st.integers(1, 6000)), draw(st.sampled_from([1, 7, 16, 32, 64, 100, 256]))
    shape = Shape(draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8])), 16, 8, n)
    seed = draw(st.integers(0, 99))
    case = make_case(shape, draw(st.sampled_from([0.5, 3.0])), draw(st.sampled_from([None, 5.0])), seed)
    pages = n // tokens + draw(st.integers(0, 1)) if n > tokens else draw(st.integers(0, 2))
    random = torch.Generator().manual_seed(seed)
    here = torch.rand(shape.batch, shape.heads, pages, generator=random) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    more, sinks = draw(st.integers(0, max(1, pages))), draw(st.integers(0, min(4, n)))
    cap = draw(st.integers(1, n))
    paged = Paged(here, tokens, more, torch.full(here.shape[:2], -1))
    torch.set_num_threads(draw(st.integers(1, 2)))
    out = Native(name).select(case.q, case.index, case.logits, cap=cap, n=n, sinks=sinks, paged=paged)
    check_counted(case, paged, cap, sinks, out)


def check_counted(case: Case, paged: Paged, cap: int, sinks: int, out: Tensor) -> None:
    """As check_choice, where the twin reaches the same pages: those of nearly equal mass may change places."""
    scores = force_sinks(score(case), sinks, None)
    n, tokens, n_pages = scores.shape[-1], paged.tokens, paged.here.shape[-1]
    last = min(n_pages, -(-n // tokens))
    padded = torch.nn.functional.pad(scores, (0, max(0, last * tokens - n)), value=-torch.inf)
    mass = padded[..., : last * tokens].unflatten(-1, (last, tokens)).logsumexp(-1) if last else scores[..., :0]
    mass = mass.masked_fill(paged.here[..., :last], -torch.inf).sort(-1, descending=True).values
    if 0 < paged.more < last:
        a, b = mass[..., paged.more - 1], mass[..., paged.more]
        if ((a - b).abs() < 4 * TOLERANCE).any():
            return
    if paged.more == 0:
        # The twin reads one page at least.
        reach = torch.ones(*scores.shape[:2], n, dtype=torch.bool)
        whole = paged.here[..., :last].repeat_interleave(tokens, -1)[..., :n]
        reach[..., : whole.shape[-1]] = whole
        for b, h in ((b, h) for b in range(scores.shape[0]) for h in range(scores.shape[1])):
            got = out[b, h, : paged.counts[b, h]]
            assert len(got) == min(cap, int(reach[b, h].sum()))
            assert reach[b, h, got].all()
        return
    check_choice(case, paged, cap, sinks, out)


def test_what_is_taken_is_not_chosen_again(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 3, 16, 8, 4000), seed=3)
    here = torch.zeros(1, 2, 62, dtype=torch.bool)
    here[..., ::3] = True
    paged = Paged(here, 64, 2, torch.zeros(1, 2, dtype=torch.int64))
    taken = kernels.select(case.q, case.index, case.logits, cap=50, n=4000, paged=paged)
    out = kernels.select(case.q, case.index, case.logits, cap=30, n=4000, taken=taken, paged=paged)
    check_choice(case, paged, 30, 0, out, taken)
    assert not set(out.flatten().tolist()) & set(taken[0, 0].tolist()) & set(taken[0, 1].tolist())
    assert forbid(score(case), select_seen(score(case), 1)).isinf().sum() == 2


def test_nothing_in_reach_is_no_choice(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 2, 16, 8, 64), seed=1)
    paged = Paged(torch.zeros(1, 2, 2, dtype=torch.bool), 32, 0, torch.full((1, 2), -1))
    kernels.select(case.q, case.index, case.logits, cap=10, n=64, sinks=4, paged=paged)
    assert paged.counts.tolist() == [[0, 0]]


def test_wrong_pages_are_refused(kernels: Native) -> None:
    case = make_case(Shape(1, 2, 2, 16, 8, 100))
    right = Paged(torch.zeros(1, 2, 3, dtype=torch.bool), 32, 1, torch.zeros(1, 2, dtype=torch.int64))
    for wrong in (
        right._replace(here=right.here.long()),
        right._replace(here=right.here[:, :1]),
        right._replace(counts=right.counts.int()),
    ):
        with pytest.raises(CacheStateError, match="contiguous"):
            kernels.select(case.q, case.index, case.logits, cap=10, n=100, paged=wrong)
    for wrong in (right._replace(tokens=0), right._replace(more=-1)):
        with pytest.raises(CacheStateError, match="expected pages of at least one token"):
            kernels.select(case.q, case.index, case.logits, cap=10, n=100, paged=wrong)


# --- a file's pages ------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.integers(0, 40))
def test_checksums_are_those_of_zlib(data: bytes, repeats: int) -> None:
    library, data = load_library(), data * repeats
    assert library is not None
    assert library.farkv_crc32(data, len(data)) == zlib.crc32(data)


PAGE, N_PAGES, BASE = 96, 30, 17


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Tensor, list[int]]:
    pages = torch.randint(0, 256, (N_PAGES, PAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "pages"
    path.write_bytes(b"x" * BASE + pages.numpy().tobytes())
    return path, pages, [zlib.crc32(page.numpy().tobytes()) for page in pages]


def read(path: Path, ids: list[int], at: list[int], sums: list[int], n_places: int) -> tuple[int, Tensor]:
    out = torch.zeros(n_places, PAGE, dtype=torch.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        kernels = Native(list_native()[0])
        n = kernels.read_pages((fd, BASE, PAGE), sums, torch.tensor(ids), torch.tensor(at), out)
    finally:
        os.close(fd)
    return n, out


def test_pages_come_to_their_places(stored: tuple[Path, Tensor, list[int]]) -> None:
    path, pages, sums = stored
    ids, at = [3, 4, 29, 0, 7, 7], [5, 0, 1, 9, 3, 4]
    n, out = read(path, ids, at, [sums[i] for i in ids], 10)
    assert n == len(ids)
    assert torch.equal(out[at], pages[ids])
    assert not out[[2, 6, 7, 8]].any()


def test_a_page_that_is_damaged_or_missing_is_named(stored: tuple[Path, Tensor, list[int]]) -> None:
    path, _, sums = stored
    assert read(path, [1, 2, 3], [0, 1, 2], [sums[1], sums[2] ^ 1, sums[3]], 3)[0] == 1
    assert read(path, [1, 40], [0, 1], [sums[1], 0], 2)[0] == 1
    os.truncate(path, BASE + 2 * PAGE + 5)
    assert read(path, [0, 1, 2], [0, 1, 2], sums[:3], 3)[0] == 2


def test_places_outside_are_refused(stored: tuple[Path, Tensor, list[int]]) -> None:
    path, _, sums = stored
    for ids, at in (([0], [3]), ([0], [-1]), ([-1], [0])):
        with pytest.raises(CacheStateError, match="room for whole pages"):
            read(path, ids, at, sums[:1], 3)
    with pytest.raises(CacheStateError, match="contiguous int64"):
        read(path, [0, 1], [0, 1], sums[:1], 3)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 60))
@settings(deadline=None)
def test_rows_are_located(seed: int, tokens: int, n: int) -> None:
    random = torch.Generator().manual_seed(seed)
    table = torch.randperm(24, generator=random).view(2, 12)
    slot_of = torch.randint(-1, 8, (24,), generator=random, dtype=torch.int32)
    heads = torch.randint(0, 2, (n,), generator=random)
    positions = torch.randint(0, 12 * tokens, (n,), generator=random)
    before = slot_of.clone()
    got = Native(list_native()[0]).locate(table, slot_of, heads, positions, tokens)
    assert torch.equal(slot_of, before)
    pages = table[heads, positions // tokens]
    want = locate(pages, positions % tokens, before)
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.pages[got.which], pages)
    # The kernel names pages in the order of the rows, the plain operations in their own.
    order = got.pages.argsort()
    for one, other in zip(got[2:], want[2:], strict=True):
        assert torch.equal(one[order], other)


def test_rows_of_no_page_are_refused() -> None:
    table, slot_of = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    kernels = Native(list_native()[0])
    for head, position in ((0, 8), (1, 0), (0, -1)):
        with pytest.raises(CacheStateError, match="a row is of no page"):
            kernels.locate(table, slot_of, torch.tensor([head]), torch.tensor([position]), 4)
    with pytest.raises(CacheStateError, match=r"contiguous torch\.int32 in"):
        kernels.locate(table, slot_of.long(), torch.tensor([0]), torch.tensor([0]), 4)
