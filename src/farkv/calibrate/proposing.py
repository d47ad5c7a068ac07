"""Propose a budget where none was given: the smallest candidate that holds, and where that was measured loses, enough.

In: a profile, the levers, how a budget is shared. Out: what every candidate holds, and the one proposed for each lever.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from farkv.calibrate.plan import Plan
from farkv.calibrate.planning import CURVE_OF, PlanBudget, Sharing, choose_cells, make_plan, sum_losses
from farkv.calibrate.profile import Profile
from farkv.config import Lever
from farkv.math.allocate import measure_layer_retention

# Fractions of the whole KV cache.
CANDIDATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Attention mass that a proposed budget holds, mean over layers and the profile's prompts.
HOLDS = 0.9
# Nats per token, summed over layers, that it loses at most; mass alone says little of what eviction costs
# (docs/decisions/0008).
LOSES = 0.1


class Candidate(NamedTuple):
    """A budget, and by lever the attention mass its shares hold; measured losses in nats, where there are any."""

    ratio: float
    held: dict[Lever, float]
    losses: dict[Lever, float]


class Proposal(NamedTuple):
    """Every candidate; the mass that is asked for; the most losses, where they were measured; budgets by lever."""

    candidates: list[Candidate]
    holds: float
    loses: float | None
    ratios: dict[Lever, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**self._asdict(), "candidates": [candidate._asdict() for candidate in self.candidates]}


def propose_budget(
    profile: Profile, levers: tuple[Lever, ...], sharing: Sharing | None = None, holds: float = HOLDS
) -> Proposal:
    """Return what every candidate holds and loses, and the smallest that does so well enough, for each lever.

    Args:
        profile: with curves.
        holds: attention mass, mean over layers and prompts; everything holds all of it, so there is always a budget.

    Raises:
        ProfileError: the profile has no curves, or no losses for the rule `loss`.
    """
    candidates = [weigh_candidate(profile, ratio, levers, sharing or Sharing()) for ratio in CANDIDATES]
    ratios: dict[Lever, float] = {}
    for lever in levers:
        enough = (c.ratio for c in candidates if c.held[lever] >= holds and c.losses.get(lever, 0.0) <= LOSES)
        ratios[lever] = next(enough, 1.0)
    return Proposal(candidates, holds, None if profile.limited is None else LOSES, ratios)


def weigh_candidate(profile: Profile, ratio: float, levers: tuple[Lever, ...], sharing: Sharing) -> Candidate:
    """Return what one budget holds, and loses, of each lever."""
    curves, budget = profile.curves(), PlanBudget(ratio=ratio)
    held: dict[Lever, float] = {}
    losses: dict[Lever, float] = {}
    for lever in levers:
        kind = CURVE_OF[lever]
        cells = choose_cells(profile, budget, lever, sharing)
        held[lever] = float(np.mean(measure_layer_retention(curves.mean(kind).numpy(), cells)))
        # Pinning changes traffic, not output.
        if profile.limited is not None and lever != "near":
            losses[lever] = sum_losses(profile.limited, kind, cells)
    return Candidate(ratio, held, losses)


def plan_proposal(
    profile: Profile, proposal: Proposal, sharing: Sharing | None = None, base: Plan | None = None
) -> Plan:
    """Return the plan of a proposal: every lever with its own budget. Raises as `make_plan`."""
    plan = base
    for lever, ratio in proposal.ratios.items():
        plan = make_plan(profile, PlanBudget(ratio=ratio), (lever,), sharing, plan)
    assert plan is not None
    return plan
