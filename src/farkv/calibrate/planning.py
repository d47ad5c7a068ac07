"""Make a plan: allocate a budget over the layers by the curves of a profile.

In: a profile, one budget, the levers it is for. Out: a `Plan`. A layer keeps or pins one set of records for all steps,
so those levers are planned on the `keep` curves; it fetches a new set at every step, so that lever is planned on the
`spread` curves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from farkv.calibrate.conformal import allocate_promise, average_allocations
from farkv.calibrate.curves import GRID, Curves, Kind
from farkv.calibrate.losses import Losses
from farkv.calibrate.plan import Allocation, Plan
from farkv.calibrate.profile import Profile
from farkv.config import LEVERS, Lever, check_fraction, check_name, is_number, read_count, show_value
from farkv.errors import ConfigError, ProfileError
from farkv.math.allocate import allocate, measure_layer_retention
from farkv.math.knapsack import choose_levels

# Candidate fractions per layer for the knapsack.
LEVELS = 72
CURVE_OF: dict[Lever, Kind] = {"keep": "keep", "near": "keep", "fetch": "spread"}


class PlanBudget(NamedTuple):
    """What is allocated over the layers; exactly one of the first four is given.

    tokens: records per KV head, summed over layers, besides the window.  ratio: fraction of the whole KV cache.
    n_bytes: KV bytes of one sequence.  retention: fraction of the attention mass to hold, mean over layers, on an
    unseen prompt with probability `confidence` (0: on the mean of the profile's prompts).  context: length in tokens
    for which tokens or n_bytes are meant; default: the profile's mean prompt.
    """

    tokens: int | None = None
    ratio: float | None = None
    n_bytes: int | None = None
    retention: float | None = None
    confidence: float = 0.9
    context: int | None = None

    def to_dict(self) -> dict[str, float]:
        """Return the fields that were given."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if self.retention is None:
            del given["confidence"]
        return given


class Sharing(NamedTuple):
    """How a budget is divided among the layers: the rule, weights, and the least fraction (`floor`) of each.

    `xkv`: greatest mean retention.  `loss`: least measured loss, by an exact knapsack.  `paper`: the mean of the
    samples' own allocations.  `maxmin`, `pyramid`, `uniform`: as in `allocate`.
    """

    rule: str = "xkv"
    weights: tuple[float, ...] | None = None
    floor: float = 0.0


def make_plan(
    profile: Profile,
    budget: PlanBudget,
    levers: tuple[Lever, ...] = ("keep", "near", "fetch"),
    sharing: Sharing | None = None,
    base: Plan | None = None,
) -> Plan:
    """Allocate one budget for the given levers.

    Args:
        profile: with curves.
        base: a plan whose other levers are copied, so that one file can drive several levers at different budgets.

    Raises:
        ProfileError: the profile has no curves. ConfigError: the budget cannot be used.
    """
    check_budget(budget)
    for lever in levers:
        check_name("lever", lever, LEVERS)
    curves = profile.curves()
    sharing = sharing or Sharing()
    made: dict[Lever, Allocation] = {}
    for lever in levers:
        kind = CURVE_OF[lever]
        cells = choose_cells(profile, budget, lever, sharing)
        made[lever] = describe(curves, budget, kind, sharing_of(lever, sharing), cells)
        if profile.limited is not None and lever != "near":
            made[lever] = replace(made[lever], losses=compare_losses(profile.limited, curves, kind, cells))
    if base is not None:
        base.check(profile.identity, list(curves.layers))
        made = {**base.levers, **made}
    return Plan(profile.identity, curves.layers, made)


def sharing_of(lever: Lever, sharing: Sharing) -> Sharing:
    """Return how a lever's budget is shared: pinning changes traffic, not output, so it has no loss to minimise."""
    return sharing._replace(rule="xkv") if sharing.rule == "loss" and lever == "near" else sharing


def choose_cells(profile: Profile, budget: PlanBudget, lever: Lever, sharing: Sharing) -> np.ndarray:
    """Allocate a budget over the layers for one lever, in cells of the grid."""
    curves, kind, mine = profile.curves(), CURVE_OF[lever], sharing_of(lever, sharing)
    if mine.rule == "loss":
        return lose_cells(profile.losses(), curves, kind, count_cells(curves, budget))
    return find_cells(curves, budget, kind, mine)


def find_cells(curves: Curves, budget: PlanBudget, kind: Kind, sharing: Sharing) -> np.ndarray:
    """Allocate a budget over the layers, in cells of the grid."""
    if not is_number(sharing.floor) or not 0 <= sharing.floor < 1:
        raise ConfigError(f"floor: expected a fraction in [0, 1), got {show_value(sharing.floor)}")
    options = {"weights": sharing.weights, "floor": round(sharing.floor * GRID)}
    if budget.retention is not None and budget.confidence > 0 and sharing.rule == "xkv":
        return promise_cells(curves, budget, kind, options)
    return share_cells(curves, budget, kind, sharing, options)


def describe(curves: Curves, budget: PlanBudget, kind: Kind, sharing: Sharing, cells: np.ndarray) -> Allocation:
    """Return the allocation of these cells, with the attention mass that it and equal fractions hold in the profile."""
    if sharing.rule != "xkv":
        # Only the rule xkv is calibrated: other plans must not record a confidence.
        budget = budget._replace(confidence=0.0)
    mean = curves.mean(kind).numpy()
    window = int(curves.settings.get("window", 0))
    # Budgets in bytes or as a ratio count every record; tokens and retention exclude the window, as the curves do. For
    # a retention, one more record makes up for rounding a fraction of a context down.
    on_top = {"tokens": window, "retention": window + 1}
    extra = next((n for name, n in on_top.items() if getattr(budget, name) is not None), 0)
    total = int(cells.sum())
    uniform = allocate(mean, tokens=total, rule="uniform")
    return Allocation(
        shares=tuple(float(c) / GRID for c in cells),
        base=extra if kind == "keep" else 0,
        rule=sharing.rule,
        budget=budget.to_dict(),
        retention=tuple(float(r) for r in measure_layer_retention(mean, cells)),
        uniform=tuple(float(r) for r in measure_layer_retention(mean, uniform)),
    )


def share_cells(
    curves: Curves, budget: PlanBudget, kind: Kind, sharing: Sharing, options: dict[str, Any]
) -> np.ndarray:
    """Allocate on the mean curve; `paper` allocates on each sample alone and averages the allocations."""
    limit = limit_cells(curves, budget)
    if sharing.rule == "paper":
        rows = curves.keep if kind == "keep" else curves.spread
        return average_allocations(rows.numpy(), **limit, **options)
    return allocate(curves.mean(kind).numpy(), rule=sharing.rule, **limit, **options)


def check_budget(budget: PlanBudget) -> None:
    """Raise ConfigError unless every number of a budget can be one."""
    for name, count in (("tokens", budget.tokens), ("bytes", budget.n_bytes)):
        if count is not None:
            read_count(name, count)
    if budget.context is not None:
        read_count("context", budget.context, 1)
    for name, fraction in (("ratio", budget.ratio), ("retention", budget.retention)):
        if fraction is not None:
            check_fraction(fraction, name)
    if not is_number(budget.confidence) or not 0 <= budget.confidence < 1:
        raise ConfigError(f"confidence: expected a number in [0, 1), got {show_value(budget.confidence)}")


def limit_cells(curves: Curves, budget: PlanBudget) -> dict[str, Any]:
    """Convert a budget to the allocator's arguments, in cells of the grid.

    Raises:
        ConfigError: not exactly one budget is given. ProfileError: the profile has no bytes per token.
    """
    given = [name for name in ("tokens", "ratio", "n_bytes", "retention") if getattr(budget, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"budget: expected one of tokens, ratio, bytes and retention, got {' and '.join(given) or 'none'}"
        )
    context = round(float(curves.tokens.float().mean())) if budget.context is None else budget.context
    n_layers = len(curves.layers)
    if budget.tokens is not None:
        return {"tokens": min(n_layers * GRID, int(budget.tokens * GRID / context))}
    if budget.n_bytes is not None:
        token_bytes = curves.settings.get("token_bytes")
        if token_bytes is None:
            raise ProfileError("profile: does not know the bytes of a token; make it anew: farkv profile")
        return {"n_bytes": int(budget.n_bytes * GRID / context), "token_bytes": token_bytes}
    if budget.ratio is not None:
        return {"ratio": budget.ratio}
    return {"retention": budget.retention}


def promise_cells(curves: Curves, budget: PlanBudget, kind: Kind, options: dict[str, Any]) -> np.ndarray:
    """Allocate so that an unseen prompt reaches the retention: fit on half of the prompts, calibrate on the rest."""
    fit, calibration = curves.split(0.5)
    rows = [c.keep.numpy() if kind == "keep" else c.spread.numpy() for c in (fit, calibration)]
    assert budget.retention is not None
    return allocate_promise(*rows, retention=budget.retention, confidence=budget.confidence, **options).tokens


def count_cells(curves: Curves, budget: PlanBudget) -> int:
    """Return a budget in cells, summed over layers.

    Raises:
        ConfigError: the budget is a retention, or layers differ in bytes.
    """
    if budget.retention is not None:
        raise ConfigError("rule loss: promises no retention; give tokens, ratio or bytes, or use the rule xkv")
    limit = limit_cells(curves, budget)
    if len(set(limit.get("token_bytes", [1]))) > 1:
        raise ConfigError("rule loss: expected layers of equal bytes; use the rule xkv")
    if "n_bytes" in limit:
        return int(limit["n_bytes"] // limit["token_bytes"][0])
    return int(limit["tokens"] if "tokens" in limit else limit["ratio"] * len(curves.layers) * GRID + 1e-9)


def lose_cells(losses: Losses, curves: Curves, kind: Kind, total: int) -> np.ndarray:
    """Choose one level per layer by dynamic programming, so that the sum of the measured losses is least.

    This assumes that losses add up over layers, which a joint run may contradict (docs/papers/xkv.md).

    Raises:
        ConfigError: the budget is below the least measured level of every layer.
    """
    least = max(1, round(losses.shares[0] * GRID))
    levels = np.unique(np.round(np.geomspace(least, GRID, LEVELS)).astype(np.int64))
    lost = losses.interpolate("keep" if kind == "keep" else "fetch", levels, GRID)
    return levels[choose_levels(-lost, np.broadcast_to(levels, lost.shape), total)]


def compare_losses(losses: Losses, curves: Curves, kind: Kind, cells: np.ndarray) -> dict[str, float]:
    """Return measured losses summed over layers: of this allocation, of equal fractions, and the least possible."""
    total = int(cells.sum())
    plans = {"planned": cells, "uniform": allocate(curves.mean(kind).numpy(), tokens=total, rule="uniform")}
    if total >= len(cells) * max(1, round(losses.shares[0] * GRID)):
        plans["least"] = lose_cells(losses, curves, kind, total)
    return {name: sum_losses(losses, kind, plan) for name, plan in plans.items()}


def sum_losses(losses: Losses, kind: Kind, cells: np.ndarray) -> float:
    """Return the measured losses of an allocation, summed over layers, in nats."""
    rows = losses.interpolate("keep" if kind == "keep" else "fetch", np.arange(1, GRID + 1), GRID)
    return float(sum(row[max(c, 1) - 1] for row, c in zip(rows, cells, strict=True)))
