"""Plans of bytes, of numbers alone: within every limit, no worse under larger ones, refused with enough to go on."""

from __future__ import annotations

import copy

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from farkv.engine.bytes import BytePlan, plan_bytes
from farkv.errors import CapacityError
from farkv.store.sizes import grow_capacity
from tests.engine.needs import PLACES, Case, cases, count_metadata, read_refusal

every_place = pytest.mark.parametrize("place", PLACES)
MANY = settings(max_examples=150)


def count_near(case: Case, plan: BytePlan) -> int:
    """Return the near bytes of a plan at its widest, recently used sets included."""
    sets, recent, need = case.held.sets, plan.recent, case.need
    heads = need.shape.batch * need.shape.kv_heads
    made = len(recent.records or {}) * recent.slots * heads * need.stored_bytes
    stay = sets.near_bytes if sets is not None and not recent.drops and not recent.records else 0
    return plan.near.need.total + made + stay


def count_besides(case: Case, plan: BytePlan) -> int:
    """Return the bytes beside rows in the tier that records live in."""
    need = case.need
    besides = 0 if need.keep is None else need.keep.besides
    n_layers = len(need.layers) + (0 if need.is_announced else 1)
    besides += n_layers * plan.remember_tokens * need.shape.token_bytes
    return besides + (plan.near.need.total if case.limits.near_shares_host else 0)


def count_rows(case: Case, rows: dict[int, int]) -> int:
    """Return the bytes of rows at the widest: while a layer grows, its old rows are still there."""
    need, held = case.need, case.held
    token = (need.stored_bytes + need.row_bytes) * need.shape.batch * need.shape.kv_heads
    grow = [i for i, n in rows.items() if held.capacity[i] < n]
    stay = sum(held.layer_bytes[i] for i in rows if i not in grow)
    return stay + max((held.layer_bytes[i] for i in grow), default=0) + sum(rows[i] * token for i in grow)


def count_paged(case: Case, plan: BytePlan) -> int:
    """Return the host bytes over a disk: open pages, page tables, a pass, buffers, copies, and what finds copies."""
    need, page, cache = case.need, case.limits.page, plan.cache
    assert page is not None
    assert cache is not None
    assert case.held.pages is not None
    heads, n_full = need.shape.batch * need.shape.kv_heads, need.n_rows // page.tokens
    n_open = page.tokens if case.held.pages.has_file else max(page.tokens, need.n_rows)
    fixed = len(need.layers) * heads * (n_open * need.stored_bytes + 8 * (n_full + 1))
    at_once = min(plan.chunk_tokens, need.n_new) if plan.chunk_tokens else need.n_new
    gathered = plan.near.need.decode
    if need.assembles and len(need.dense_layers) == len(need.layers):
        gathered = min(gathered, 1024 * heads * need.stored_bytes)
    fixed += 2 * heads * (at_once + page.tokens) * need.stored_bytes + gathered
    fixed += plan.near.need.total if case.limits.near_shares_host else 0
    sets = case.held.sets
    stay = sets.metadata_bytes if sets is not None and not plan.recent.drops and not plan.recent.records else 0
    copies = (cache.room - plan.recent.pages + cache.piece) * page.n_bytes
    return fixed + copies + count_metadata(need, plan) + stay


@every_place
@MANY
@given(data=st.data())
def test_a_plan_passes_no_limit(place: str, data: st.DataObject) -> None:
    case, plan = data.draw(cases(place)).raise_limits()
    need, limits = case.need, case.limits
    assert set(plan.rows) == set(need.layers)
    if limits.is_far and limits.near is not None:
        assert count_near(case, plan) <= limits.near
        if plan.index_grows:
            room = grow_capacity(0, max(plan.rows.values()))
            index = plan.near.need.index * room // max(plan.rows.values())
            assert count_near(case, plan) - plan.near.need.index + index <= limits.near
    if limits.page is not None:
        if limits.host is not None:
            assert count_paged(case, plan) <= limits.host
        n_pages = len(need.layers) * need.shape.batch * need.shape.kv_heads * (need.n_rows // limits.page.tokens)
        assert limits.disk is None or n_pages * limits.page.n_bytes <= limits.disk
    elif limits.home is not None:
        besides = count_besides(case, plan)
        if any(case.held.capacity[i] < n for i, n in plan.rows.items()):
            assert count_rows(case, plan.rows) + besides <= limits.home
            grown = {i: grow_capacity(0, n) for i, n in plan.rows.items()}
            assert not plan.home_grows or count_rows(case, grown) + besides <= limits.home
        assert not plan.recent.records or case.held.home_used + count_metadata(need, plan) <= limits.home
    if need.pool is not None:
        assert max(plan.rows.values()) <= plan.pool_rows


@every_place
@MANY
@given(data=st.data())
def test_what_fits_fits_under_larger_limits_and_is_no_smaller(place: str, data: st.DataObject) -> None:
    case, plan = data.draw(cases(place)).allow().raise_limits()
    tiers = [t for t in ("near", "host", "disk") if getattr(case.limits, t) is not None]
    assume(tiers)
    tier = data.draw(st.sampled_from(tiers))
    more = data.draw(st.one_of(st.integers(1, 3000), st.integers(1, 10**8)))
    wider = case.allow(**{tier: getattr(case.limits, tier) + more}).plan()
    assert isinstance(wider, BytePlan), f"{tier} + {more}: {wider}"
    assert wider.chunk_tokens >= plan.chunk_tokens
    assert wider.pool_rows >= plan.pool_rows
    # A pool that evicts takes all rows at once where it could not grow.
    assert all(wider.rows[i] >= min(n, case.need.tokens) for i, n in plan.rows.items())
    # Over a disk near memory is filled through host memory: what one tier takes more, the other may have less.
    # So have whole layers, which are put together where there is room for them.
    if tier != "near" and plan.cache is not None and plan.near[1:] == wider.near[1:]:
        assert wider.cache is not None
        assert wider.cache.room >= plan.cache.room
    # So have a block and a pass, of which the pass is tried first, and a block and the rows of a pool.
    if tier == "near" and wider[2:4] == plan[2:4] and (plan.cache is None or case.limits.host is None):
        assert wider.near.block_tokens >= plan.near.block_tokens


@every_place
@MANY
@given(data=st.data())
def test_a_refusal_names_the_tier_its_limit_and_enough_to_go_on(place: str, data: st.DataObject) -> None:
    case = data.draw(cases(place))
    error = case.plan()
    assume(isinstance(error, CapacityError))
    for _ in range(20):
        if isinstance(error, BytePlan):
            return
        tier, needed, limit = read_refusal(error)
        assert limit == getattr(case.limits, tier)
        assert needed > limit
        case = case.allow(**{tier: needed})
        again = case.plan()
        if isinstance(again, CapacityError):
            assert read_refusal(again)[0] != tier or read_refusal(again)[1] > needed
        error = again
    raise AssertionError("what an error asks for is never enough")


@every_place
@given(data=st.data())
def test_the_same_numbers_give_the_same_plan_and_stay_as_they_are(place: str, data: st.DataObject) -> None:
    case = data.draw(cases(place))
    before = copy.deepcopy(case)
    first, second = case.plan(), case.plan()
    assert (first == second) if isinstance(first, BytePlan) else (str(first) == str(second))
    assert case == before
    if isinstance(first, BytePlan):
        assert plan_bytes(before.need, before.held, before.limits) == first


@every_place
@MANY
@given(data=st.data())
def test_whole_layers_are_refused_nothing_that_blocks_are_not(place: str, data: st.DataObject) -> None:
    case = data.draw(cases(place))
    assume(case.need.pool is None)
    case, blocks = case._replace(need=case.need._replace(assembles=False)).raise_limits()
    whole = case._replace(need=case.need._replace(assembles=True)).plan()
    assert isinstance(whole, BytePlan)
    # Nor is a prompt read in smaller passes for them.
    assert whole.chunk_tokens >= blocks.chunk_tokens
    assert blocks.near.streams or not whole.near.streams
