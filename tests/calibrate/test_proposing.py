"""A proposed budget: the smallest candidate that holds enough, of every lever by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farkv.calibrate.plan import Plan
from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
from farkv.calibrate.profile import Profile
from farkv.calibrate.proposing import CANDIDATES, LOSES, plan_proposal, propose_budget
from farkv.demo import MODEL_PATH

DEMO = Profile.load(MODEL_PATH / "profile.safetensors")


@pytest.mark.parametrize("rule", ["xkv", "uniform", "loss"])
def test_every_candidate_is_what_a_plan_of_it_holds(rule: str) -> None:
    proposal = propose_budget(DEMO, ("keep", "fetch"), Sharing(rule))
    assert tuple(c.ratio for c in proposal.candidates) == CANDIDATES
    made = make_plan(DEMO, PlanBudget(ratio=0.3), ("keep", "fetch"), Sharing(rule))
    (candidate,) = (c for c in proposal.candidates if c.ratio == 0.3)
    for lever, allocation in made.levers.items():
        assert candidate.held[lever] == pytest.approx(sum(allocation.retention) / len(allocation.retention))
        assert candidate.losses[lever] == pytest.approx(allocation.losses["planned"])


@pytest.mark.parametrize("holds", [0.5, 0.9, 0.99, 1.0, 2.0])
def test_the_smallest_that_holds_enough_is_taken(holds: float) -> None:
    proposal = propose_budget(DEMO, ("keep", "near", "fetch"), holds=holds)
    assert proposal.loses == LOSES
    for lever, ratio in proposal.ratios.items():
        chosen = next(c for c in proposal.candidates if c.ratio == ratio)
        assert chosen.held[lever] >= holds or ratio == 1
        assert chosen.losses.get(lever, 0) <= LOSES
        fewer = [c for c in proposal.candidates if c.ratio < ratio]
        assert all(c.held[lever] < holds or c.losses.get(lever, 0) > LOSES for c in fewer)
    # Choosing anew at every step needs less than what is kept for good.
    assert proposal.ratios["fetch"] <= proposal.ratios["keep"]
    # What is pinned near is still in the pool: it costs nothing but time.
    assert proposal.ratios["near"] <= proposal.ratios["keep"]
    assert holds <= 1 or set(proposal.ratios.values()) == {1.0}


def test_without_measured_losses_the_mass_decides() -> None:
    proposal = propose_budget(replace(DEMO, limited=None), ("keep", "near"))
    assert proposal.loses is None
    assert proposal.ratios["keep"] == proposal.ratios["near"]


def test_a_proposal_becomes_a_plan_beside_what_a_base_has() -> None:
    base = make_plan(DEMO, PlanBudget(ratio=0.5), ("keep",))
    proposal = propose_budget(DEMO, ("fetch",))
    plan = plan_proposal(DEMO, proposal, base=base)
    assert isinstance(plan, Plan)
    assert plan.get("keep") == base.get("keep")
    assert plan.get("fetch").budget == {"ratio": proposal.ratios["fetch"]}
