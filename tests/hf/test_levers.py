"""Three levers: what they refuse, that memory is freed and limits hold, that near and fetch cost no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import farkv
from farkv.calibrate.plan import Plan
from farkv.engine import bytes_recent
from farkv.errors import CapacityError, ConfigError, PlanError
from farkv.hf.identity import identify_model
from farkv.methods import XKV, Full, InfiniGen, Oracle, Window
from farkv.store.far.kept import ROW_BYTES
from tests.engine.kept import IDS, KeptTape, make_shares, steps
from tests.hf.tape import check_replay, replay
from tests.hf.test_attach import describe as describe_model
from tests.hf.test_attach import settle
from tests.hf.test_limits import NEW, PROMPT, TOKENS, WHOLE, count_storages, near_tensors, tiny
from tests.models import assert_same, forward, generate, make_model, make_prompt, plain_cache

SHARES = (0.2, 0.5, 0.3, 0.4)


def everything(model: Any, **changes: Any) -> Plan:
    levers = {"keep": (0.9, 0.5, 0.6, 0.7), "near": SHARES, "fetch": (0.1, 0.3, 0.2, 0.2)}
    return make_shares(model, **{**levers, **changes})


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "with_plan", "says"),
    [
        ((Full(), Window()), False, "one method"),
        ((XKV(), XKV()), False, "one method"),
        ((XKV(levers=("keep", "near")),), True, "without a selector"),
        ((XKV(levers=("fetch",)),), False, "without a selector"),
        ((XKV(levers=("fetch",)), InfiniGen()), False, "driven by a plan"),
        ((Full(), XKV()), False, "Full: reads everything"),
        ((Full(),), True, "Full: reads everything"),
        ((XKV(fraction=0.3),), True, "leave out fraction"),
        ((XKV(tokens=40), InfiniGen()), True, "leave out fraction"),
        ((XKV(retention=0.5, levers=("near",)), InfiniGen()), True, "leave out fraction"),
        ((XKV(rule="uniform"),), True, "and rule"),
        ((InfiniGen(fraction=0.1),), True, "the plan fetches 0.200"),
        ((Oracle(fraction=0.1), XKV(levers=("fetch",))), True, "the plan fetches 0.200"),
        ((InfiniGen(paper=True, fraction=0.5),), True, "paper=True"),
    ],
)
def test_methods_and_plans_that_contradict_each_other_are_refused(methods: Any, with_plan: bool, says: str) -> None:
    model = make_model("llama")
    before = settle(model)
    with pytest.raises(ConfigError, match=says):
        farkv.attach(model, *methods, plan=everything(model) if with_plan else None)
    assert describe_model(model) == before


def test_a_refused_plan_leaves_the_model_as_it_was(tmp_path: Any) -> None:
    model = make_model("llama")
    before, plan = settle(model), everything(model)
    other = Plan({**plan.identity, next(iter(plan.identity)): "another"}, plan.layers, plan.levers)
    fewer = make_shares(make_model("gemma3"), keep=(0.3, 0.4))
    fewer = Plan(identify_model(model), fewer.layers, fewer.levers)
    keep_alone = make_shares(model, keep=SHARES)
    for methods, bad, says in (
        ((XKV(),), other, "the model's is"),
        ((XKV(),), fewer, "is for layers"),
        ((InfiniGen(),), keep_alone, "not fetch"),
        ((InfiniGen(), XKV(levers=("near",))), keep_alone, "not near"),
        ((XKV(),), tmp_path / "none.json", "cannot be read"),
    ):
        with pytest.raises(PlanError, match=says):
            farkv.attach(model, *methods, plan=bad)
        assert describe_model(model) == before


def test_the_receipt_names_what_is_pulled() -> None:
    model = make_model("llama")
    plan = everything(model)
    for methods, used, name in (
        ((XKV(),), None, "xkv"),
        ((XKV(paper=True),), None, "xkv-paper"),
        ((XKV(),), plan, "xkv"),
        ((InfiniGen(), XKV()), None, "infinigen+xkv(keep)"),
        ((InfiniGen(),), plan, "infinigen+xkv(fetch)"),
        ((), plan, "infinigen+xkv(fetch)"),
        ((XKV(levers=("fetch", "keep", "near")), InfiniGen()), plan, "infinigen+xkv(keep,near,fetch)"),
    ):
        with farkv.attach(model, *methods, plan=used) as far:
            forward(model, IDS, far.new_cache())
            assert far.receipt().method == name


def test_a_plan_may_be_a_path(tmp_path: Any) -> None:
    model = make_model("llama")
    plan = everything(model)
    plan.save(tmp_path / "plan.json")
    held = []
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        with farkv.attach(model, XKV(), plan=given) as far:
            forward(model, IDS, cache := far.new_cache())
        held.append([cache.engine.store.length(i) for i in range(4)])
    assert held[0] == held[1] == held[2]
    # One less where the next token would be one too many.
    for n, share in zip(held[0], (0.9, 0.5, 0.6, 0.7), strict=True):
        assert 0 <= int(share * 60) - n <= 1


# --- memory -----------------------------------------------------------------------------------------------------


def home_tensors(store: Any) -> list[Any]:
    """Return every tensor that is counted where records live."""
    rows = [*store.pool.values(), *store.shadow.values()]
    rows += [r for kept in store.kept.values() for r in (kept.places, kept.scores)]
    rows += [pinned.slots for pinned in store.pinned.values()]
    return [r.data for r in rows] + [t for each in store.recently_used.values() for t in each.metadata]


def watch(model: Any, cache: Any, limits: dict[str, int]) -> Any:
    """After every pass: what is allocated is what the ledgers say, and within the limit."""

    def after(*_: object) -> None:
        store = cache.engine.store
        home, other = (store.near, store.host) if store.home is store.near else (store.host, store.near)
        near = near_tensors(cache.engine) + [pinned.rows.data for pinned in store.pinned.values()]
        assert count_storages(near) == other.used <= limits.get(other.tier, other.used)
        # Where near memory is no tier of its own, it is the host's.
        held = count_storages(home_tensors(store)) + (other.used if store.shares_host else 0)
        assert held == home.used <= limits.get(home.tier, home.used)

    return model.register_forward_hook(after)


TINY_KEEP = {"keep": (0.9, 0.4)}
TINY_ALL = {"keep": (1.0, 0.5), "near": (0.3, 0.2), "fetch": (0.2, 0.4)}
WAYS: dict[str, tuple[Any, Any]] = {
    "xkv": ((XKV(fraction=0.4),), None),
    "tokens": ((XKV(tokens=20, sinks=0),), None),
    "planned": ((XKV(),), TINY_KEEP),
    "infinigen+keep": ((InfiniGen(fraction=0.3), XKV(fraction=0.6)), None),
    "infinigen+plan": ((InfiniGen(), XKV(levers=("keep", "near", "fetch"))), TINY_ALL),
}


def run(way: str, limits: dict[str, int], *, reserve: bool, verify: int = 0, n: int = NEW) -> bool:
    """Generate under limits; return whether it was done, having checked what must hold either way."""
    model, (methods, shares) = tiny(), WAYS[way]
    plan = make_shares(model, **shares) if shares else None
    with farkv.attach(model, *methods, plan=plan, **limits) as far:
        try:
            cache = far.new_cache(tokens=TOKENS + n if reserve else 0, verify=verify)
        except CapacityError as error:
            assert reserve, error
            return False
        hook = watch(model, cache, limits)
        done = True
        try:
            generate(model, PROMPT, cache, n=n)
        except CapacityError as error:
            done = False
            assert len({cache.engine.store.seen(i) for i in (0, 1)}) == 1, "half a token was stored"
            assert "raise --" in str(error)
            assert not reserve, f"refused only after it was admitted: {error}"
        finally:
            hook.remove()
        size = far.receipt(cache).kv_bytes
        assert size.near_peak <= limits.get("near", size.near_peak)
        assert size.host_peak <= limits.get("host", size.host_peak)
    return done


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize(
    ("way", "tier"),
    [
        ("xkv", "near"), ("xkv", "host"), ("tokens", "host"), ("planned", "near"),
        ("infinigen+keep", "host"), ("infinigen+plan", "host"), ("infinigen+plan", "near"),
    ],
)  # fmt: skip
def test_limits_are_never_passed_and_refusals_come_first(way: str, tier: str, reserve: bool) -> None:
    other = {"near": 4 * WHOLE} if way == "infinigen+plan" and tier == "host" else {}
    sizes = [WHOLE * step // 12 for step in range(1, 46, 4)]
    done = [run(way, {tier: size, **other}, reserve=reserve) for size in sizes]
    assert not done[0]
    assert done[-1]
    assert done == sorted(done), "a larger limit never refuses what a smaller one took"
    # Just where it is first taken, byte by byte nearly.
    low, high = sizes[done.index(True) - 1], sizes[done.index(True)]
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (low, middle) if run(way, {tier: middle, **other}, reserve=reserve) else (middle, high)
    assert all(run(way, {tier: high + step * 61, **other}, reserve=reserve) for step in range(4))


@pytest.mark.parametrize("way", ["xkv", "planned", "infinigen+plan"])
def test_what_is_remembered_to_verify_is_admitted_too(way: str) -> None:
    for reserve in (True, False):
        limits = {"near": 4 * WHOLE} if way == "infinigen+plan" else {}
        done = [run(way, {**limits, "host": WHOLE * s // 8}, reserve=reserve, verify=3) for s in range(4, 46, 5)]
        assert done == sorted(done)
        assert done[-1]
        assert not done[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("near", [None, "1MiB"])
def test_what_is_allocated_is_what_the_ledgers_say(way: str, near: Any) -> None:
    assert run(way, {} if near is None else {"near": 1 << 20}, reserve=False, n=40)


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_evicted_memory_is_really_freed(near: Any) -> None:
    model = make_model("llama")
    ids = make_prompt(1, tokens=400)["input_ids"]
    with farkv.attach(model, XKV(fraction=0.25), near=near) as far:
        cache = far.new_cache()
        forward(model, ids, cache)
        store = cache.engine.store
        token = 2 * (2 * 8 * 4 + ROW_BYTES)
        held = count_storages(home_tensors(store))
        assert held == store.home.used
        # One spare row per layer, for the next token.
        assert 0 <= held - sum(rows.length for rows in store.pool.values()) * token <= 4 * token
        assert held <= 0.25 * 4 * 400 * token
        assert (store.host.used == 0) == (near is not None), "with a near limit records live in near memory"
        assert (store.near.used == 0) == (near is None)
        receipt = far.receipt()
        assert receipt.fetched_bytes_per_token == 0
        cache.reset()
        assert store.host.used == store.near.used == store.index.used == 0


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("tokens", [0, 420])
def test_a_planned_prompt_never_holds_more_than_the_plan(near: Any, tokens: int) -> None:
    model = make_model("llama")
    plan = make_shares(model, keep=SHARES)
    ids = make_prompt(1, tokens=400)["input_ids"]
    token = 2 * (2 * 8 * 4 + ROW_BYTES)
    with farkv.attach(model, XKV(), plan=plan, near=near) as far:
        cache = far.new_cache(tokens=tokens)
        forward(model, ids, cache)
        home = cache.engine.store.home
        planned = sum(int(share * (tokens or 400)) for share in SHARES) * token
        assert home.peak <= planned
        # And less is no option: one record per layer is left for the next token.
        assert home.used >= planned - 4 * token
        if tokens:
            steps(model, cache, ids[:, :20])
            assert home.peak <= planned, "a reserved context never grows"
        assert far.receipt().kept_fraction <= sum(SHARES) / 4


# --- the near lever ---------------------------------------------------------------------------------------------


def run_near(plan: Plan, levers: Any, ids: torch.Tensor, play: Any, near: Any = "1MiB") -> tuple[Any, Any, Any]:
    model = make_model("llama")
    method = InfiniGen(fraction=0.3, top_up=0.0)
    with farkv.attach(model, method, *levers, plan=plan, near=near) as far:
        cache = far.new_cache()
        forward(model, ids, cache)
        return play(model, cache), far.receipt(), cache


PLAYS: dict[str, Any] = {
    "steps": lambda model, cache: steps(model, cache, IDS[:, :20]),
    "crop": lambda model, cache: (
        steps(model, cache, IDS[:, :9]) + [cache.crop(-7)][:0] + steps(model, cache, IDS[:, 9:16])
    ),
    "reorder": lambda model, cache: (
        steps(model, cache, IDS[:, :4]) + [cache.reorder_cache(torch.tensor([1, 1]))][:0]
        + steps(model, cache, IDS[:, 4:12])
    ),
    "repeat": lambda model, cache: [cache.batch_repeat_interleave(2)][:0]
    + steps(model, cache, IDS[[0, 1, 1, 0], :8]),
}  # fmt: skip


@pytest.mark.parametrize("play", PLAYS)
@pytest.mark.parametrize("keep", [False, True])
def test_pinning_near_changes_no_answer_and_fetches_less(
    play: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is pinned is compared with nothing near: a recently used set would spare more.
    monkeypatch.setattr(bytes_recent, "LEAST_SLOTS", math.inf)
    model = make_model("llama")
    plan = everything(model, fetch=(0.3,) * 4)
    names = ("keep",) if keep else ()
    without = (XKV(levers=("keep", "fetch")),) if keep else (XKV(levers=("fetch",)),)
    pinned = (XKV(levers=(*names, "near", "fetch")),)
    expected, before, _ = run_near(plan, without, IDS, PLAYS[play])
    found, after, cache = run_near(plan, pinned, IDS, PLAYS[play])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert 0 < after.fetched_bytes_per_token < 0.8 * before.fetched_bytes_per_token
    assert after.read_fraction == before.read_fraction
    copies = len(IDS) * (2 if play == "repeat" else 1)
    rows = sum(each.rows.n_bytes for each in cache.engine.store.pinned.values())
    most = sum(int(share * 60) for share in SHARES) * copies * 2 * 64
    assert 0.8 * most < rows <= most
    assert rows == most or keep, "what is evicted, and the window, needs no copy"


def test_pinned_and_fetched_are_all_that_is_chosen() -> None:
    model = make_model("llama")
    plan = everything(model, fetch=(0.3,) * 4)
    with farkv.attach(model, InfiniGen(top_up=0.0), XKV(levers=("near", "fetch")), plan=plan, near="1MiB") as far:
        cache = far.new_cache()
        with KeptTape(model, cache) as tape:
            forward(model, IDS, cache)
            pinned = {i: cache.engine.store.pinned[i].slots.view()[..., 0].clone() for i in range(4)}
            forward(model, IDS[:, :1], cache)
        fetched = far.receipt().fetched_bytes_per_token
    missing = 0
    for layer, (positions, _) in tape.passes[1].reads.items():
        chosen = positions[..., : -cache.engine.parts.budgets.split(61, layer).newest]
        missing += int((pinned[layer].gather(-1, chosen) < 0).sum())
        assert int((pinned[layer] >= 0).sum()) == int(SHARES[layer] * 60) * 4
    assert missing > 0
    assert fetched == missing * 64


def test_without_a_near_limit_the_near_lever_costs_nothing() -> None:
    model = make_model("llama")
    plan = everything(model)
    with farkv.attach(model, InfiniGen(), XKV(levers=("near", "fetch")), plan=plan) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        steps(model, cache, IDS[:, :2])
    assert cache.engine.store.pinned == {}
    assert cache.engine.store.near.peak == cache.engine.store.index.peak


# --- the fetch lever --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", [InfiniGen(), Oracle(fraction=0.5), InfiniGen(top_p=0.9)])
def test_every_layer_reads_its_own_share(method: Any, near: Any) -> None:
    model = make_model("llama")
    shares = (0.1, 0.3, 0.2, 0.6)
    with farkv.attach(model, method, plan=make_shares(model, fetch=shares), near=near) as far:
        cache = far.new_cache()
        with KeptTape(model, cache) as tape:
            generate(model, make_prompt(2, tokens=60, pad=9), cache, n=6)
        receipt = far.receipt()
    assert receipt.read_fraction <= sum(shares) / 4
    for row, share in zip(receipt.layers, shares, strict=True):
        assert row.read_fraction <= share
        if getattr(method, "top_p", None) is None:
            # One record of 52 is what rounding may cost; of padding nobody has a share.
            assert row.read_fraction > share * (1 - 9 / 120) - 1 / 52
    check_replay(model, tape)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_plan_that_fetches_all_equals_the_plain_model(family: str, near: Any) -> None:
    model, prompt = make_model(family), make_prompt(3, pad=9)
    n = 2 if family == "gemma3" else 4
    plain = generate(model, prompt)
    whole = dict.fromkeys(("keep", "near", "fetch"), (1.0,) * n)
    levers = XKV(levers=("keep", "near", "fetch"))
    with farkv.attach(model, InfiniGen(), levers, plan=make_shares(model, **whole), near=near) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_all_three_levers_equal_a_dense_replay(near: Any) -> None:
    model = make_model("llama")
    levers = XKV(levers=("keep", "near", "fetch"))
    with farkv.attach(model, InfiniGen(), levers, plan=everything(model), near=near) as far:
        cache = far.new_cache()
        with KeptTape(model, cache) as tape:
            generate(model, make_prompt(3, tokens=60, pad=20), cache, n=6)
    assert all(cache.engine.store.evicted.values())
    check_replay(model, tape)


# --- verified against what was evicted --------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_quality_is_measured_against_all_records(planned: bool, beside: bool) -> None:
    model, prompt = make_model("llama"), make_prompt(2, tokens=60, pad=10)
    plan = make_shares(model, keep=SHARES) if planned else None
    methods = ((InfiniGen(fraction=0.2),) if beside else ()) + ((XKV() if planned else XKV(fraction=0.35)),)
    receipts, outs = [], []
    for verify in (0, 4):
        with farkv.attach(model, *methods, plan=plan) as far:
            cache = far.new_cache(verify=verify)
            with KeptTape(model, cache) as tape:
                outs.append(generate(model, prompt, cache, n=5))
            receipts.append(far.receipt())
    assert_same(outs[1], outs[0])
    assert receipts[0].kept_fraction == receipts[1].kept_fraction < 0.36 + 0.2 * planned
    assert receipts[0].read_fraction == receipts[1].read_fraction
    assert receipts[0].evicted_records == receipts[1].evicted_records > 0
    quality = receipts[1].quality
    assert quality.steps == 8
    assert 0 < quality.mass_min < quality.mass_mean < 1
    # The first step alone: full attention over everything is the plain model's own step.
    with farkv.attach(model, *methods, plan=plan) as far:
        out = generate(model, prompt, far.new_cache(verify=1), n=2)
        first = far.receipt().quality
    cache = plain_cache(model)
    places = (prompt["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    forward_prompt = model(**prompt, position_ids=places, past_key_values=cache)
    token = forward_prompt.logits[:, -1].argmax(-1, keepdim=True)
    mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1)
    position = mask.sum(-1, keepdim=True) - 1
    full = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]
    full, ours = full.double().log_softmax(-1), out.logits[1].double().log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1)
    assert first.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert kl.mean() > 1e-4, "what was evicted mattered"
    assert not math.isnan(replay(model, tape.passes[:1], torch.float64)[0].sum().item())
