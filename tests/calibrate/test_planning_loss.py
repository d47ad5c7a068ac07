"""The rule `loss`: the least sum of measured losses, checked against every combination of levels."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from farkv.calibrate import planning
from farkv.calibrate.curves import GRID
from farkv.calibrate.losses import SHARES, Losses
from farkv.calibrate.plan import Plan
from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
from farkv.calibrate.profile import Profile
from farkv.errors import ConfigError, ProfileError
from farkv.show import draw_plan
from tests.calibrate.test_planning import LAYERS, draw_curves, make_profile

LOSS = Sharing(rule="loss")


def draw_losses(seed: int = 0) -> Losses:
    """Layers of very different weight; one falls off a cliff, so that no greedy rule finds the optimum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor(SHARES)
    rows = torch.stack([0.1**layer * (1 - x) ** 2 for layer in range(LAYERS)])
    rows[3] = torch.where(x < 0.4, 0.5, 0.0)
    rows = rows + 1e-3 * torch.rand(rows.shape, generator=generator) * (1 - x)
    return Losses(rows, rows.flip(0), SHARES, tuple(range(LAYERS)), 2)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return dataclasses.replace(make_profile(draw_curves()), limited=draw_losses())


def cells_of(plan: Plan, lever: str) -> np.ndarray:
    return np.array([round(s * GRID) for s in plan.get(lever).shares])  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3, 0.6])
def test_no_combination_of_levels_loses_less(profile: Profile, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEVELS", 9)
    levels = np.unique(np.round(np.geomspace(max(1, round(SHARES[0] * GRID)), GRID, 9)).astype(int))
    for lever, kind in (("keep", "keep"), ("fetch", "fetch")):
        plan = make_plan(profile, PlanBudget(ratio=ratio), (lever,), LOSS)  # type: ignore[arg-type]
        assert profile.limited is not None
        lost = profile.limited.interpolate(kind, levels, GRID)  # type: ignore[arg-type]
        total = int(ratio * LAYERS * GRID + 1e-9)
        best = min(
            sum(lost[i, j] for i, j in enumerate(choice))
            for choice in itertools.product(range(len(levels)), repeat=LAYERS)
            if sum(levels[j] for j in choice) <= total
        )
        cells = cells_of(plan, lever)
        assert cells.sum() <= total
        found = sum(lost[i, list(levels).index(c)] for i, c in enumerate(cells))
        assert found == pytest.approx(best, abs=1e-9)


def test_what_is_held_near_has_no_loss_to_share_by(profile: Profile) -> None:
    plan = make_plan(profile, PlanBudget(ratio=0.2), sharing=LOSS)
    assert [plan.get(lever).rule for lever in ("keep", "near", "fetch")] == ["loss", "xkv", "loss"]
    assert not plan.get("near").losses


def test_every_rule_is_told_what_it_loses(profile: Profile) -> None:
    budget = PlanBudget(ratio=0.2)
    for rule in ("xkv", "uniform", "pyramid", "maxmin", "paper", "loss"):
        losses = make_plan(profile, budget, ("keep",), Sharing(rule=rule)).get("keep").losses
        assert set(losses) == {"planned", "uniform", "least"}
        assert losses["least"] <= losses["planned"] + 1e-6
        if rule in ("uniform", "loss"):
            assert losses["planned"] == pytest.approx(losses["uniform" if rule == "uniform" else "least"])


def test_a_plan_file_holds_the_losses(profile: Profile, tmp_path) -> None:
    plan = make_plan(profile, PlanBudget(ratio=0.2), sharing=LOSS)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert draw_plan(plan) is not None


def test_it_refuses_what_it_cannot_do(profile: Profile) -> None:
    with pytest.raises(ConfigError, match="retention"):
        make_plan(profile, PlanBudget(retention=0.9), ("keep",), LOSS)
    with pytest.raises(ConfigError):
        make_plan(profile, PlanBudget(ratio=0.001), ("keep",), LOSS)
    with pytest.raises(ProfileError, match="--losses"):
        make_plan(make_profile(draw_curves()), PlanBudget(ratio=0.2), ("keep",), LOSS)


def test_bytes_and_tokens_are_budgets_too(profile: Profile) -> None:
    by_bytes = make_plan(profile, PlanBudget(n_bytes=256 * LAYERS * 100, context=1000), ("keep",), LOSS)
    by_ratio = make_plan(profile, PlanBudget(ratio=0.1), ("keep",), LOSS)
    by_tokens = make_plan(profile, PlanBudget(tokens=LAYERS * 100, context=1000), ("keep",), LOSS)
    assert cells_of(by_bytes, "keep").tolist() == cells_of(by_ratio, "keep").tolist()
    assert cells_of(by_tokens, "keep").tolist() == cells_of(by_ratio, "keep").tolist()
    assert by_tokens.get("keep").base == 8, "the window comes besides"
