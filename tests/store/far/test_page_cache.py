"""Page copies in host memory: right rows, right tables, never more bytes than counted, whatever the policy."""

from __future__ import annotations

import copy
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError, StoreError
from farkv.kernels.native import load_native
from farkv.store.far.eviction import POLICIES, make_policy
from farkv.store.far.in_flight import Plan
from farkv.store.far.page_cache import PageCache
from farkv.store.far.page_file import DiskSpace
from farkv.store.far.pages import NumberedPages, PageForm
from farkv.store.ledger import Ledger

FORM = PageForm(4, 3, torch.float32)
N = 12


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskSpace]:
    with DiskSpace(Path(tmp_path_factory.mktemp("pages")), None) as space:
        yield space


def make(space: DiskSpace, policy: str = "lru", limit: int | None = None, n: int = N) -> tuple[PageCache, torch.Tensor]:
    pages = NumberedPages(FORM, space.open_file(FORM.n_bytes))
    rows = torch.randn(n, FORM.tokens, FORM.width)
    pages.write(rows)
    return PageCache(Ledger("host", limit), make_policy(policy), pages), rows


def check_tables(cache: PageCache) -> None:
    """Copies are right, and every byte is counted."""
    check_copies(cache)
    assert cache.ledger.used == cache.n_bytes
    assert cache.ledger.limit is None or cache.ledger.peak <= cache.ledger.limit


def check_copies(cache: PageCache) -> None:
    """Both tables say the same, no page is in two slots, and every copy is the page that it is said to be."""
    assert 0 <= cache.used <= cache.room
    here = cache.slots.page_of[: cache.used]
    assert (here >= 0).all()
    assert (cache.slots.page_of[cache.used :] == -1).all()
    assert len(here.unique()) == len(here), "a page in two slots"
    assert torch.equal(cache.slots.slot_of[here].long(), torch.arange(cache.used))
    assert int((cache.slots.slot_of >= 0).sum()) == cache.used
    if cache.used:
        wanted = torch.empty(cache.used, *cache.data.shape[1:], dtype=cache.data.dtype)
        cache.pages.read(here, wanted)
        assert torch.equal(cache.data[: cache.used], wanted)


def check_take(cache: PageCache, rows: torch.Tensor, n: int = 20) -> None:
    """Rows are right, though other rows may have been planned before."""
    pages, offsets = torch.randint(len(rows), (n,)), torch.randint(FORM.tokens, (n,))
    out = torch.full((n, FORM.width), torch.nan)
    cache.take(pages, offsets, out)
    assert torch.equal(out, rows[pages, offsets])
    check_tables(cache)


steps = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 30)),
    st.tuples(st.just("plan"), st.integers(1, 30)),
    st.tuples(st.just("bring"), st.just(0)),
    st.tuples(st.just("resize"), st.integers(0, 2 * N)),
    st.tuples(st.just("piece"), st.integers(1, 9)),
    st.tuples(st.just("write"), st.integers(1, 5)),
    st.tuples(st.just("make_room"), st.integers(0, 6)),
    st.tuples(st.just("others"), st.integers(0, 10)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("clear"), st.just(0)),
)


class Waiting:
    """Plans that were made and not brought yet, oldest first, as a link has them."""

    def __init__(self) -> None:
        self.plans: list[tuple[Plan, torch.Tensor]] = []

    def plan(self, cache: PageCache, rows: torch.Tensor, n: int) -> None:
        table = torch.arange(len(rows))[None]
        positions = torch.randint(0, len(rows) * FORM.tokens, (n,)).sort().values
        planned = cache.plan_rows(table, torch.zeros(n, dtype=torch.int64), positions)
        self.plans.append((planned, rows[positions // FORM.tokens, positions % FORM.tokens]))
        assert cache.ledger.used == cache.n_bytes

    def bring(self, cache: PageCache) -> None:
        if self.plans:
            plan, want = self.plans.pop(0)
            out = torch.full_like(want, torch.nan)
            cache.bring(plan, out)
            cache.end(plan)
            assert torch.equal(out, want)


def read_beside(cache: PageCache, rows: torch.Tensor, n: int) -> None:
    """Read every page while other things take `n` pages' bytes of the tier: reads make do with fewer copies."""
    limit = cache.ledger.limit
    least = 0 if cache.scratch is not None else cache.piece
    if limit is None or not cache.ledger.has_room(n * FORM.n_bytes) or (n + least) * FORM.n_bytes > limit:
        return
    cache.ledger.charge(n * FORM.n_bytes)
    pages = torch.arange(len(rows))
    out = torch.empty(len(rows), FORM.width)
    cache.take(pages, pages % FORM.tokens, out)
    assert torch.equal(out, rows[pages, pages % FORM.tokens])
    cache.ledger.release(n * FORM.n_bytes)


def make_room(cache: PageCache, n: int) -> None:
    cache.make_room(n * FORM.n_bytes)
    assert cache.ledger.has_room(n * FORM.n_bytes) or cache.used == 0


def clear(cache: PageCache) -> None:
    cache.clear()
    assert cache.ledger.used == 0


@pytest.mark.parametrize("policy", POLICIES)
@given(moves=st.lists(steps, max_size=20), seed=st.integers(0, 99), limit=st.sampled_from([None, 10, 14]))
def test_rows_are_right_whatever_happens(
    space: DiskSpace, policy: str, moves: list[tuple[str, int]], seed: int, limit: int | None
) -> None:
    torch.manual_seed(seed)
    cache, rows = make(space, policy, limit and limit * FORM.n_bytes)
    cache.resize(4, 2)
    twins, waiting = [], Waiting()
    for what, n in moves:
        if what == "copy":
            # What was planned is of this cache, not of its copy.
            while waiting.plans:
                waiting.bring(cache)
            twins.append((cache, rows))
            cache = copy.deepcopy(cache)
            assert cache.used == 0
        elif what == "write":
            new = torch.randn(n, FORM.tokens, FORM.width)
            cache.offer(cache.pages.write(new), new)
            rows = torch.cat([rows, new])
        else:
            move = {
                "take": lambda n, cache=cache, rows=rows: check_take(cache, rows, n),
                "resize": lambda n, cache=cache: cache.resize(n, cache.piece),
                "piece": lambda n, cache=cache: cache.resize(cache.room, n),
                "make_room": lambda n, cache=cache: make_room(cache, n),
                "others": lambda n, cache=cache, rows=rows: read_beside(cache, rows, n),
                "clear": lambda n, cache=cache: clear(cache),
                "plan": lambda n, cache=cache, rows=rows: waiting.plan(cache, rows, n),
                "bring": lambda n, cache=cache: waiting.bring(cache),
            }
            move[what](n)
        if not cache.in_flight.plans:
            check_tables(cache)
    while waiting.plans:
        waiting.bring(cache)
    for other, its_rows in twins:
        check_take(other, its_rows)


def test_no_room_at_all_still_reads(space: DiskSpace) -> None:
    cache, rows = make(space)
    check_take(cache, rows, 50)
    assert cache.used == 0


def test_reading_without_memory_to_read_through_is_refused(space: DiskSpace) -> None:
    cache, _ = make(space, limit=2 * FORM.n_bytes)
    cache.resize(0, 3)
    with pytest.raises(CapacityError, match="host limit"):
        cache.take(torch.tensor([0]), torch.tensor([0]), torch.empty(1, FORM.width))
    check_tables(cache)


def test_a_damaged_page_changes_no_table_and_gives_no_rows(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(4, 2)
    check_take(cache, rows)
    assert cache.pages.file is not None
    resident = cache.slots.page_of[:4].tolist()
    bad = next(i for i in range(N) if i not in resident)
    os.pwrite(cache.pages.file._fd, b"\xff", bad * FORM.n_bytes + 5)
    with pytest.raises(StoreError, match=f"page {bad} is damaged"):
        cache.take(torch.tensor([bad]), torch.tensor([0]), torch.empty(1, FORM.width))
    here = torch.tensor(resident)
    out = torch.empty(4, FORM.width)
    cache.take(here, torch.zeros(4, dtype=torch.int64), out)
    assert torch.equal(out, rows[here, 0])
    assert cache.slots.page_of[:4].tolist() == resident


def test_the_policy_decides_which_copy_goes(space: DiskSpace) -> None:
    cache, _ = make(space, "lru")
    cache.resize(3, 1)
    for page in (0, 1, 2, 0, 1, 3):
        cache.take(torch.tensor([page]), torch.tensor([1]), torch.empty(1, FORM.width))
    assert cache.resident(torch.arange(N)).nonzero()[:, 0].tolist() == [0, 1, 3]
    fifo, _ = make(space, "fifo")
    fifo.resize(3, 1)
    for page in (0, 1, 2, 0, 1, 3):
        fifo.take(torch.tensor([page]), torch.tensor([1]), torch.empty(1, FORM.width))
    assert fifo.resident(torch.arange(N)).nonzero()[:, 0].tolist() == [1, 2, 3]


def test_fewer_reads_at_once_give_their_memory_back(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(2, 8)
    check_take(cache, rows)
    assert cache.n_bytes == 10 * FORM.n_bytes
    cache.resize(2, 3)
    assert cache.n_bytes == 2 * FORM.n_bytes
    check_take(cache, rows)
    assert cache.n_bytes == 5 * FORM.n_bytes


def count_resident_bytes(memory: mmap.mmap) -> int:
    """Return the bytes that a mapping takes, by the system's own count."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    inside = total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(x, 16) for x in first.split("-"))
            inside = start <= address < stop
        elif inside and line.startswith("Rss:"):
            total = int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not count them")
def test_memory_of_dropped_copies_goes_back_to_the_system(tmp_path: Path) -> None:
    form = PageForm(1, 1 << 18, torch.float32)
    with DiskSpace(tmp_path, None) as space:
        pages = NumberedPages(form, space.open_file(form.n_bytes))
        cache = PageCache(Ledger("host"), make_policy("lru"), pages)
        rows = torch.ones(8, form.tokens, form.width)
        cache.resize(6)
        cache.offer(pages.write(rows), rows)
        assert cache.memory is not None
        full = count_resident_bytes(cache.memory)
        cache.resize(2)
        # Of the four, what shares a huge page with those that stay may go later.
        assert full - count_resident_bytes(cache.memory) >= 2 * form.n_bytes
        assert cache.data[3].sum() == 0, "shared memory would still have it"
        cache.resize(64)
        assert count_resident_bytes(cache.memory) < full, "room takes no memory before it is used"
        assert torch.equal(cache.data[:2], rows[:2])


@given(st.sampled_from(POLICIES), st.integers(0, 6), st.integers(0, 9999))
def test_kernels_and_plain_operations_copy_the_same_rows(space: DiskSpace, policy: str, room: int, seed: int) -> None:
    """As many pages are read, and the same copies stay, whichever of them finds and moves the rows."""
    kernels = load_native()
    if kernels is None:
        pytest.skip("the native library was not built")
    twins, random = [], torch.Generator().manual_seed(seed)
    rows = torch.randn(N, FORM.tokens, FORM.width, generator=random)
    table = torch.arange(N).view(2, N // 2)
    for mover in (None, kernels):
        pages = NumberedPages(FORM, space.open_file(FORM.n_bytes))
        pages.write(rows)
        pages.use(mover)
        cache = PageCache(Ledger("host"), make_policy(policy), pages, mover)
        cache.resize(room)
        twins.append(cache)
    for _ in range(4):
        n = int(torch.randint(1, 30, (1,), generator=random))
        heads, _ = torch.randint(0, 2, (n,), generator=random).sort()
        # Ascending, as choices are: pages are then missing in the same order.
        positions = torch.randint(0, N // 2 * FORM.tokens, (n,), generator=random)
        positions = (heads * N * FORM.tokens + positions).sort().values - heads * N * FORM.tokens
        out = [torch.empty(n, FORM.width) for _ in twins]
        for cache, place in zip(twins, out, strict=True):
            plan = cache.plan_rows(table, heads, positions)
            cache.bring(plan, place)
            cache.end(plan)
            check_tables(cache)
        assert torch.equal(out[0], rows[heads * (N // 2) + positions // FORM.tokens, positions % FORM.tokens])
        assert torch.equal(out[0], out[1])
        # As long as either table may be, the pages' slots are the same.
        assert torch.equal(*[cache.find(torch.arange(N)) for cache in twins])


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_read_that_fails_leaves_no_copy(space: DiskSpace, tmp_path: Path, has_kernels: bool) -> None:
    mover = load_native() if has_kernels else None
    cache, rows = make(space, n=6)
    cache.mover = mover
    cache.pages.use(mover)
    cache.resize(4)
    out = torch.empty(4, FORM.width)
    cache.take(torch.arange(4), torch.zeros(4, dtype=torch.int64), out)
    assert cache.used == 4
    file = cache.pages.file
    assert file is not None
    right, file._checksums[5] = file._checksums[5], 0
    with pytest.raises(StoreError, match="page 5 is damaged"):
        cache.take(torch.tensor([0, 5]), torch.zeros(2, dtype=torch.int64), out[:2])
    check_tables(cache)
    file._checksums[5] = right
    cache.take(torch.tensor([0, 5]), torch.zeros(2, dtype=torch.int64), out[:2])
    assert torch.equal(out[:2], rows[[0, 5], 0])
    check_tables(cache)


def test_what_is_planned_counts_as_here_before_it_is_read(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(4, 2)
    waiting = Waiting()
    torch.manual_seed(0)
    waiting.plan(cache, rows[:3], 9)
    assert cache.resident(torch.arange(3)).all()
    # Another read makes do without the slots that are planned.
    check_take(cache, rows, 30)
    assert cache.resident(torch.arange(3)).all()
    waiting.bring(cache)
    check_tables(cache)


def test_a_plan_is_void_once_slots_are_dropped(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(4, 2)
    waiting = Waiting()
    waiting.plan(cache, rows, 9)
    cache.make_room(1 << 40)
    cache.resize(0, 2)
    assert cache.used == 0
    waiting.bring(cache)
    waiting.plan(cache, rows, 9)
    cache.resize(4, 2)
    waiting.plan(cache, rows, 9)
    cache.clear()
    for _ in range(2):
        waiting.bring(cache)
    check_tables(cache)


def test_a_planned_read_that_fails_is_no_copy_for_the_next(space: DiskSpace) -> None:
    cache, rows = make(space, n=6)
    cache.resize(4, 2)
    file = cache.pages.file
    assert file is not None
    table, head, positions = torch.arange(6)[None], torch.zeros(2, dtype=torch.int64), torch.tensor([1, 22])
    first = cache.plan_rows(table, head, positions)
    second = cache.plan_rows(table, head, positions)
    right, file._checksums[5] = file._checksums[5], 0
    out = torch.empty(2, FORM.width)
    with pytest.raises(StoreError, match="page 5 is damaged"):
        cache.bring(first, out)
    cache.end(first)
    check_tables(cache)
    with pytest.raises(StoreError, match="page 5 is damaged"):
        # It believed that the first one would read its pages.
        cache.bring(second, out)
    cache.end(second)
    file._checksums[5] = right
    cache.take(torch.tensor([0, 5]), torch.tensor([1, 2]), out)
    assert torch.equal(out, rows[[0, 5], [1, 2]])
    check_tables(cache)


def test_a_plan_that_nobody_brings_leaves_no_copy(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(4, 2)
    cache.plan_rows(torch.arange(N)[None], torch.zeros(2, dtype=torch.int64), torch.tensor([1, 22]))
    cache.rest()
    assert not cache.resident(torch.arange(N)).any()
    check_take(cache, rows)


def test_room_that_is_enough_drops_nothing_however_far_a_fetch_is(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(6, 2)
    check_take(cache, rows[:3], 9)
    used, waiting = cache.used, Waiting()
    waiting.plan(cache, rows, 3)
    more = cache.used
    cache.resize(6, 2)
    cache.make_room(0)
    assert cache.used == more >= used
    waiting.bring(cache)
    check_tables(cache)


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_plan_that_was_given_up_never_writes_to_slots_of_others(space: DiskSpace, has_kernels: bool) -> None:
    """Ctrl-C while another cache keeps the worker: it comes to what nobody waits for any more."""
    cache, rows = make(space)
    cache.mover = load_native() if has_kernels else None
    cache.pages.use(cache.mover)
    cache.resize(9, 2)
    table, head = torch.arange(N)[None], torch.zeros(3, dtype=torch.int64)
    out = torch.empty(3, FORM.width)
    for pages in ([9, 10, 11], [0, 1, 2]):
        cache.take(torch.tensor(pages), head, out)
    early, late = (cache.plan_rows(table, head, torch.tensor(at) * FORM.tokens) for at in ([3, 4, 5], [6, 7, 8]))
    cache.end(late)
    for plan, first in ((early, 3), (late, 6)):
        cache.bring(plan, out)
        assert torch.equal(out, rows[first : first + 3, 0])
    cache.rest()
    check_tables(cache)
    cache.take(torch.tensor([3, 4, 5]), head, out)
    assert torch.equal(out, rows[3:6, 0])


def test_rows_in_slots_of_an_earlier_plan_bring_that_too(space: DiskSpace) -> None:
    cache, rows = make(space)
    cache.resize(4, 2)
    table, head, at = torch.arange(N)[None], torch.zeros(2, dtype=torch.int64), torch.tensor([1, 22])
    first, second = (cache.plan_rows(table, head, at) for _ in range(2))
    out = torch.empty(2, FORM.width)
    cache.bring(second, out)
    assert torch.equal(out, rows[[0, 5], [1, 2]])
    cache.bring(first, out)
    for plan in (first, second):
        cache.end(plan)
    check_tables(cache)
