"""Drawn numbers for plans: any pass over any context, in any place, with what an earlier plan left."""

from __future__ import annotations

import re
from typing import NamedTuple

from hypothesis import strategies as st

from farkv.engine.bytes import BytePlan, plan_bytes
from farkv.engine.bytes_need import ByteLimits, Held, Need, PagesHeld, PageSize, PoolNeed, SetsHeld, SharesNeed
from farkv.errors import CapacityError
from farkv.store.sizes import LayerShape, grow_capacity

PLACES = ("in place", "near", "coded", "host", "gpu", "disk", "disk, near")
LAYERS = [0, 2, 3, 5]


class PerToken(NamedTuple):
    """So many bytes or records for every token, and so many at least, of those that there are."""

    share: float
    least: int = 0

    def __call__(self, n: int) -> int:
        return max(min(n, self.least), int(self.share * n))


class Case(NamedTuple):
    """What a plan is made of."""

    place: str
    need: Need
    held: Held
    limits: ByteLimits

    def plan(self) -> BytePlan | CapacityError:
        """Return the plan, or its refusal."""
        try:
            return plan_bytes(self.need, self.held, self.limits)
        except CapacityError as error:
            return error

    def allow(self, **limits: int | None) -> Case:
        """Return the case under other limits; where records live in a tier, it has that tier's limit."""
        new, need, held = self.limits._replace(**limits), self.need, self.held
        if need.pool is not None:
            # Who raises a limit begins anew: how many rows it has room for is not known yet.
            need = need._replace(pool=need.pool._replace(capacity=0, length=0))
            held = hold_nothing(need, new)
        new = new._replace(home=new.near if new.home_name == "near" else new.host)
        return self._replace(need=need, held=held, limits=new)

    def raise_limits(self) -> tuple[Case, BytePlan]:
        """Raise every limit to what refusals ask for, until there is a plan: limits are then tight."""
        case, plan = self, self.plan()
        for _ in range(20):
            if isinstance(plan, BytePlan):
                return case, plan
            tier, needed, _ = read_refusal(plan)
            case = case.allow(**{tier: needed})
            plan = case.plan()
        raise AssertionError(f"what an error asks for is never enough: {plan}")


@st.composite
def needs(draw: st.DrawFn, place: str) -> Need:
    """Draw what a pass needs."""
    shape = LayerShape(*(draw(st.integers(1, n)) for n in (3, 3, 16, 16)), draw(st.sampled_from([2, 4])))
    tokens = draw(st.integers(1, 6000))
    in_memory = not place.startswith("disk")
    lives_near = place == "near"
    kind = draw(st.sampled_from(["plain", "keep", "pool"] if in_memory and place != "coded" else ["plain", "pool"]))
    kind = "keep" if lives_near else kind if in_memory else "plain"
    rows = draw(st.integers(1, tokens)) if kind != "plain" else tokens
    layers = LAYERS[: draw(st.integers(1, 4))]
    n_new = draw(st.one_of(st.just(1), st.integers(1, rows)))
    chunk = draw(st.sampled_from([0, 0, 1, 64, 500, 2048]))
    coded = place == "coded" or (in_memory is False and draw(st.booleans()))
    stored = draw(st.integers(1, shape.record_bytes)) if coded else shape.record_bytes
    keep = pool = None
    if kind == "keep":
        keep = SharesNeed({i: draw(st.integers(1, tokens)) for i in layers}, draw(st.integers(0, 10**5)))
    if kind == "pool":
        pool = PoolNeed(draw(st.integers(0, 4)), draw(st.integers(1, 17)), stored + 10, 0, 0)
    return Need(
        shape=shape,
        layers=layers,
        tokens=tokens,
        n_rows=rows,
        n_new=n_new,
        chunk=chunk,
        reserve_tokens=draw(st.sampled_from([0, tokens, tokens + 7])),
        stored_bytes=stored,
        row_bytes=0 if kind == "plain" else 6,
        window=draw(st.integers(0, 20)),
        dense_layers=frozenset(layers[:1] if draw(st.booleans()) else layers if draw(st.booleans()) else []),
        index_bytes=PerToken(draw(st.sampled_from([0.0, 0.5, 4.0, 40.0]))),
        read_rows=PerToken(draw(st.floats(0, 1)), draw(st.integers(1, 70))),
        pinned_bytes=PerToken(0.0 if in_memory is False else draw(st.sampled_from([0.0, 0.0, 30.0]))),
        is_coded=coded,
        evicts=kind != "plain",
        verifies=draw(st.booleans()),
        decodes=n_new == 1 and not chunk and draw(st.booleans()),
        keep=keep,
        pool=pool,
        assembles=pool is None and draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn, place: str) -> Case:
    """Draw a pass, limits around what it needs, and what is held: nothing, or what another plan left."""
    need = draw(needs(place))
    whole = len(need.layers) * need.tokens * need.shape.token_bytes + 1000

    def limit(*, always: bool = False) -> int | None:
        given_one = always or draw(st.booleans())
        return int(draw(st.floats(0, 1.0)) ** 3 * 4 * whole) + draw(st.integers(0, 4000)) if given_one else None

    far, shares = place not in ("in place", "near"), place in ("in place", "coded", "disk")
    near = limit(always=True) if place in ("near", "host", "disk, near") else None
    host = limit(always=need.pool is not None)
    page = None
    if place.startswith("disk"):
        tokens = draw(st.sampled_from([1, 4, 16, 64]))
        page = PageSize(tokens, tokens * need.stored_bytes)
    home = near if place == "near" else host
    limits = ByteLimits(
        near, host, home, "near" if place == "near" else "host", far, shares, need.pinned_bytes(1000) > 0, page,
        limit() if page else None,
    )  # fmt: skip
    if need.keep is None and draw(st.booleans()):
        return begin(need, limits, place)
    return Case(place, need, hold_nothing(need, limits), limits)


def begin(need: Need, limits: ByteLimits, place: str) -> Case:
    """Return the case of a pass where an earlier plan, of a context half as long, was used to the full."""
    empty = hold_nothing(need, limits)
    before = need._replace(tokens=max(1, need.tokens // 2), n_rows=max(1, need.n_rows // 2), n_new=1, chunk=0)
    try:
        plan = plan_bytes(before, empty, limits)
    except CapacityError:
        return Case(place, need, empty, limits)
    if need.pool is not None:
        length = min(before.tokens, max(plan.rows.values()))
        need = need._replace(pool=need.pool._replace(capacity=plan.pool_rows, length=length))
    return Case(place, need, hold(before, limits, plan), limits)


def hold_nothing(need: Need, limits: ByteLimits) -> Held:
    """Return what an empty cache holds."""
    return Held(dict.fromkeys(need.layers, 0), dict.fromkeys(need.layers, 0), pages=no_pages(limits))


def no_pages(limits: ByteLimits) -> PagesHeld | None:
    """Return the pages of an empty cache."""
    return None if limits.page is None else PagesHeld(limits.disk is not None, 0, 0, 0, 0, 0, 0)


def hold(need: Need, limits: ByteLimits, plan: BytePlan) -> Held:
    """Return what is held where a plan was used to the full."""
    heads = need.shape.batch * need.shape.kv_heads
    capacity = {i: grow_capacity(0, n) if plan.home_grows else n for i, n in plan.rows.items()}
    layer_bytes = {i: n * heads * (need.stored_bytes + need.row_bytes) for i, n in capacity.items()}
    pages, sets = None, None
    if plan.recent.records:
        n_bytes = len(plan.recent.records) * plan.recent.slots * heads * need.stored_bytes
        sets = SetsHeld(plan.recent.records, need.shape.batch, n_bytes, count_metadata(need, plan))
    if limits.page is not None and plan.cache is not None:
        n = len(need.layers) * heads * (need.n_rows // limits.page.tokens)
        room = plan.cache.room - plan.recent.pages
        on_disk = n * limits.page.n_bytes if limits.disk is not None else 0
        pages = PagesHeld(limits.disk is not None, 0, n, room, min(n, room), plan.cache.piece, on_disk)
        capacity = dict.fromkeys(need.layers, need.n_rows)
        layer_bytes = dict.fromkeys(need.layers, 0)
    near = plan.near.need
    return Held(
        capacity, layer_bytes, near_used=near.total + (sets.near_bytes if sets else 0) if limits.is_far else 0,
        index_used=near.index if limits.is_far else 0, home_used=sum(layer_bytes.values()), home_grows=plan.home_grows,
        sets=sets, pages=pages,
    )  # fmt: skip


def count_metadata(need: Need, plan: BytePlan) -> int:
    """Return the bytes of what finds recently used copies: of a record 4, of a slot 8."""
    records = plan.recent.records or {}
    heads = need.shape.batch * need.shape.kv_heads
    return heads * sum(4 * n + 8 * plan.recent.slots for n in records.values())


def read_refusal(error: CapacityError) -> tuple[str, int, int]:
    """Return the tier that an error names, the bytes needed, and the limit."""
    found = re.fullmatch(
        r"(\w+) limit: .+ needs ([\d,]+) bytes \(.+\), the limit is ([\d,]+) \(.+\); "
        r"raise --(\w+) to at least (\d+), or shorten the context",
        str(error),
    )
    assert found is not None, str(error)
    tier, needed, limit, again, number = found.groups()
    assert tier == again
    assert needed.replace(",", "") == number
    return tier, int(number), int(limit.replace(",", ""))
