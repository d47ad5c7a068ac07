"""Plans from measured curves: the budget is held exactly, the retention reached, every rule does what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import farkv
from farkv.calibrate.curves import GRID, Curves, to_grid
from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
from farkv.calibrate.profile import Profile
from farkv.calibrate.profile import make_profile as new_profile
from farkv.errors import ConfigError, PlanError, ProfileError
from farkv.hf.identity import identify_model
from farkv.math.allocate import allocate, measure_layer_retention, measure_retention
from farkv.methods import XKV, InfiniGen
from tests.models import forward, make_model, make_prompt

LAYERS = 5


def draw_curves(n: int = 24, seed: int = 0, window: int = 8) -> Curves:
    """Power laws whose exponents grow with the layer, and differ by prompt."""
    rng = np.random.default_rng(seed)
    rows = np.empty((2, n, LAYERS, GRID))
    for kind in (0, 1):
        for i in range(n):
            for layer in range(LAYERS):
                power = 0.3 + 0.5 * layer + 0.4 * rng.random() + 0.5 * kind
                gains = torch.from_numpy(np.arange(1, 301) ** -power).float()
                rows[kind, i, layer] = to_grid(gains / gains.sum()).numpy()
    keep, spread = torch.from_numpy(rows).float()
    settings = {"scorer": "window", "window": window, "pool": 7, "token_bytes": [256] * LAYERS}
    return Curves(keep, spread, torch.full((n,), 400), tuple(range(LAYERS)), settings)


def make_profile(curves: Curves) -> Profile:
    """A profile that holds curves alone, of the tiny Llama's identity."""
    return new_profile({}, identify_model(make_model("llama")), curves)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile(draw_curves())


def share_sum(plan: Any, lever: str) -> float:
    return sum(round(share * GRID) for share in plan.get(lever).shares) / GRID


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.777, 1.0])
def test_a_ratio_is_held_exactly(profile: Profile, ratio: float) -> None:
    plan = make_plan(profile, PlanBudget(ratio=ratio))
    for lever in ("keep", "near", "fetch"):
        allocation = plan.get(lever)  # type: ignore[arg-type]
        assert sum(round(s * GRID) for s in allocation.shares) == int(ratio * GRID * LAYERS + 1e-9)
        assert allocation.ratio == pytest.approx(ratio, abs=1 / GRID)
        assert allocation.base == 0
        assert allocation.budget == {"ratio": ratio}
        assert np.mean(allocation.retention) >= np.mean(allocation.uniform) - 1e-9
    assert plan.layers == tuple(range(LAYERS))
    assert plan.identity == profile.identity


def test_the_shares_are_the_allocators_on_the_mean_curve(profile: Profile) -> None:
    plan = make_plan(profile, PlanBudget(ratio=0.2))
    for lever, kind in (("keep", "keep"), ("near", "keep"), ("fetch", "spread")):
        gains = profile.curves().mean(kind).numpy()  # type: ignore[arg-type]
        cells = allocate(gains, ratio=0.2)
        allocation = plan.get(lever)  # type: ignore[arg-type]
        assert np.array_equal(np.round(np.array(allocation.shares) * GRID), cells)
        assert np.allclose(allocation.retention, measure_layer_retention(gains, cells))
        assert np.allclose(allocation.uniform, measure_layer_retention(gains, np.full(LAYERS, 200)))
    assert plan.get("keep").shares == plan.get("near").shares != plan.get("fetch").shares


def test_tokens_are_those_of_the_context_and_come_beside_the_window(profile: Profile) -> None:
    plan = make_plan(profile, PlanBudget(tokens=200), ("keep", "fetch"))
    # 200 records of five layers of 400 tokens, the profile's mean prompt.
    assert share_sum(plan, "keep") == pytest.approx(200 / 400, abs=1 / GRID)
    assert plan.get("keep").base == 8
    assert plan.get("fetch").base == 0
    longer = make_plan(profile, PlanBudget(tokens=200, context=4000), ("keep",))
    assert share_sum(longer, "keep") == pytest.approx(200 / 4000, abs=1 / GRID)
    whole = make_plan(profile, PlanBudget(tokens=10**9), ("keep",))
    assert whole.get("keep").shares == (1.0,) * LAYERS


def test_bytes_are_those_of_one_sequence(profile: Profile) -> None:
    token = 256
    plan = make_plan(profile, PlanBudget(n_bytes=token * 500, context=400), ("keep",))
    used = share_sum(plan, "keep") * 400 * token
    assert token * 500 * 0.99 <= used <= token * 500
    bare = draw_curves()
    del bare.settings["token_bytes"]
    with pytest.raises(ProfileError, match="does not know the bytes"):
        make_plan(make_profile(bare), PlanBudget(n_bytes=10**6))


@pytest.mark.parametrize("retention", [0.5, 0.8, 0.95])
def test_a_retention_is_reached_on_the_mean_with_the_least(profile: Profile, retention: float) -> None:
    plan = make_plan(profile, PlanBudget(retention=retention, confidence=0), ("keep", "fetch"))
    for lever, kind in (("keep", "keep"), ("fetch", "spread")):
        gains = profile.curves().mean(kind).numpy()  # type: ignore[arg-type]
        allocation = plan.get(lever)  # type: ignore[arg-type]
        cells = np.round(np.array(allocation.shares) * GRID).astype(int)
        assert measure_retention(gains, cells) >= retention
        assert np.mean(allocation.retention) >= retention - 1e-9
        fewer = allocate(gains, tokens=int(cells.sum()) - 1)
        assert measure_retention(gains, fewer) < retention
    assert plan.get("keep").base == 9


def test_a_promise_takes_more_than_the_mean_and_holds_on_the_other_half(profile: Profile) -> None:
    mean = make_plan(profile, PlanBudget(retention=0.8, confidence=0), ("keep",)).get("keep")
    promised = [
        make_plan(profile, PlanBudget(retention=0.8, confidence=c), ("keep",)).get("keep") for c in (0.5, 0.7, 0.9)
    ]
    assert promised[0].ratio <= promised[1].ratio <= promised[2].ratio
    assert promised[2].ratio > mean.ratio
    assert promised[2].budget == {"retention": 0.8, "confidence": 0.9}
    cells = np.round(np.array(promised[2].shares) * GRID).astype(int)
    unseen = draw_curves(200, seed=5)
    reached = [measure_retention(row.numpy(), cells) >= 0.8 for row in unseen.keep]
    assert np.mean(reached) > 0.75


def test_a_promise_that_no_calibration_can_give_is_refused(profile: Profile) -> None:
    with pytest.raises(ConfigError, match="needs 99 samples, got 12"):
        make_plan(profile, PlanBudget(retention=0.8, confidence=0.99))


@pytest.mark.parametrize("rule", ["xkv", "maxmin", "pyramid", "uniform", "paper"])
def test_every_rule_spends_the_same(profile: Profile, rule: str) -> None:
    allocation = make_plan(profile, PlanBudget(ratio=0.3), ("keep",), Sharing(rule)).get("keep")
    assert allocation.rule == rule
    assert allocation.ratio == pytest.approx(0.3, abs=LAYERS / GRID)
    best = make_plan(profile, PlanBudget(ratio=0.3), ("keep",)).get("keep")
    if rule in ("maxmin", "pyramid", "uniform"):
        assert np.mean(allocation.retention) < np.mean(best.retention)
    if rule == "uniform":
        assert len(set(allocation.shares)) == 1
        assert allocation.retention == allocation.uniform
    if rule == "maxmin":
        assert min(allocation.retention) > min(best.retention)
    if rule == "pyramid":
        assert list(allocation.shares) == sorted(allocation.shares, reverse=True)


def test_the_papers_rule_is_the_mean_of_the_samples_own_allocations(profile: Profile) -> None:
    allocation = make_plan(profile, PlanBudget(ratio=0.3), ("keep",), Sharing("paper")).get("keep")
    rows = profile.curves().keep.numpy()
    expected = np.rint(np.mean([allocate(row, ratio=0.3) for row in rows], 0))
    assert np.array_equal(np.round(np.array(allocation.shares) * GRID), expected)


def test_no_promise_is_noted_where_none_is_made(profile: Profile) -> None:
    # Only the rule xkv is calibrated on unseen prompts.
    for rule in ("maxmin", "uniform", "paper"):
        allocation = make_plan(profile, PlanBudget(retention=0.8), ("keep",), Sharing(rule)).get("keep")
        assert allocation.budget["confidence"] == 0


@pytest.mark.parametrize("rule", ["xkv", "maxmin", "uniform", "paper"])
def test_every_layer_gets_the_floor(profile: Profile, rule: str) -> None:
    plan = make_plan(profile, PlanBudget(ratio=0.2), ("keep",), Sharing(rule, None, 0.15))
    assert min(plan.get("keep").shares) >= 0.15
    promised = make_plan(profile, PlanBudget(retention=0.6, confidence=0.5), ("keep",), Sharing(rule, None, 0.15))
    assert min(promised.get("keep").shares) >= 0.15


def test_weights_draw_records_and_belong_to_the_rule_xkv(profile: Profile) -> None:
    plain = make_plan(profile, PlanBudget(ratio=0.2), ("keep",)).get("keep")
    heavy = make_plan(profile, PlanBudget(ratio=0.2), ("keep",), Sharing("xkv", (1, 1, 1, 1, 5))).get("keep")
    assert heavy.shares[4] > plain.shares[4]
    with pytest.raises(ConfigError, match="weights"):
        make_plan(profile, PlanBudget(ratio=0.2), ("keep",), Sharing("uniform", (1, 1, 1, 1, 5)))


def test_a_base_gives_the_other_levers(profile: Profile) -> None:
    base = make_plan(profile, PlanBudget(ratio=0.5), ("keep", "near"))
    both = make_plan(profile, PlanBudget(ratio=0.1), ("near", "fetch"), base=base)
    assert set(both.levers) == {"keep", "near", "fetch"}
    assert both.get("keep") == base.get("keep")
    assert both.get("near").ratio == pytest.approx(0.1)
    other = farkv.Plan({"architecture": "other"}, base.layers, base.levers)
    with pytest.raises(PlanError):
        make_plan(profile, PlanBudget(ratio=0.1), ("fetch",), base=other)


@pytest.mark.parametrize(
    ("budget", "sharing", "says"),
    [
        (PlanBudget(), Sharing(), "got none"),
        (PlanBudget(tokens=10, ratio=0.5), Sharing(), "tokens and ratio"),
        (PlanBudget(ratio=0.0), Sharing(), "ratio"),
        (PlanBudget(ratio=1.5), Sharing(), "ratio"),
        (PlanBudget(retention=1.2), Sharing(), "retention"),
        (PlanBudget(retention=0.8, confidence=1.5), Sharing(), "confidence"),
        (PlanBudget(tokens=10, context=0), Sharing(), "context"),
        (PlanBudget(ratio=0.3), Sharing("magic"), "rule"),
        (PlanBudget(ratio=0.3), Sharing(floor=1.0), "floor"),
        (PlanBudget(ratio=0.3), Sharing(floor=-0.1), "floor"),
        (PlanBudget(ratio=0.1), Sharing(floor=0.5), "floors alone need"),
    ],
)
def test_budgets_that_cannot_be_used_are_refused(
    profile: Profile, budget: PlanBudget, sharing: Sharing, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_plan(profile, budget, ("keep",), sharing)


def test_a_profile_without_curves_makes_no_plan() -> None:
    measured = farkv.profile(make_model("llama"), [make_prompt(1, tokens=40)["input_ids"][0]], curves=False)
    with pytest.raises(ProfileError, match="curves"):
        make_plan(measured, PlanBudget(ratio=0.3))


def test_a_measured_profile_drives_all_three_levers() -> None:
    model = make_model("llama")
    prompts = [make_prompt(1, tokens=80 + i, seed=i)["input_ids"][0] for i in range(3)]
    plan = make_plan(farkv.profile(model, prompts), PlanBudget(ratio=0.4))
    levers = XKV(levers=("keep", "near", "fetch"))
    with farkv.attach(model, InfiniGen(), levers, plan=plan, near="1MiB") as far:
        cache = far.new_cache()
        ids = make_prompt(1, tokens=100)["input_ids"]
        forward(model, ids, cache)
        forward(model, ids[:, :1], cache)
        receipt = far.receipt()
    assert 0.35 < receipt.kept_fraction <= 0.4
    assert receipt.read_fraction <= 0.4


ODD: list[Any] = [float("nan"), float("inf"), -1, "0.5", True, [1], 10**400, 10**5000]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
@pytest.mark.parametrize("name", ["tokens", "ratio", "n_bytes", "retention", "context", "confidence"])
def test_a_number_that_is_none_is_refused_in_words(profile: Profile, name: str, odd: Any) -> None:
    budget = PlanBudget(**({name: odd} if name not in ("context", "confidence") else {"ratio": 0.5, name: odd}))
    with pytest.raises(ConfigError) as error:
        make_plan(profile, budget)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
