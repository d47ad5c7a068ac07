"""Choose one level per unit under a budget, exactly: by water-filling where gains decrease, else by a knapsack.

In: value and cost of each level of each unit. Out: one level per unit. NumPy only, stateless.

Water-filling takes all pages whose integer key is above a level; keys do not increase along a unit. So choices are
nested in the budget, and bisection finds the level. The knapsack takes any values.

Source: multiple-choice knapsack by dynamic programming over the budget (Kellerer, Pferschy, Pisinger 2004, ch. 11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from farkv.errors import ConfigError

# Limits on table entries (unit, cost), 4 bytes each, and on candidates (unit, level, cost), 2 ns each.
MAX_CELLS = 2 * 10**8
MAX_CANDIDATES = 2 * 10**9
# Maps one page number per unit to these pages' keys: int64, at least 0, not increasing along a unit.
Keys = Callable[[np.ndarray], np.ndarray]


class _Table(NamedTuple):
    """The best sum of values at every exact total cost, and the level that each unit takes in it."""

    best: np.ndarray
    choices: list[np.ndarray]
    costs: np.ndarray

    def trace(self, cost: int) -> Int64[np.ndarray, " U"]:
        """Return the levels behind `best[cost]`."""
        levels = np.empty(len(self.choices), np.int64)
        for unit, choice in enumerate(self.choices):
            levels[unit] = choice[cost]
            cost -= int(self.costs[unit, levels[unit]])
        return levels


def choose_levels(values: np.ndarray, costs: np.ndarray, budget: int) -> Int64[np.ndarray, " U"]:
    """Pick exactly one level of every unit: the largest sum of values whose costs fit the budget.

        max sum_u values[u, k_u]   subject to   sum_u costs[u, k_u] <= budget

    Of equal sums the lower total cost wins, then the lower level of the first unit, of the second, and so on. Sums
    are float64, added from the last unit to the first: "equal" means equal in that order of addition.

    Args:
        values: [U, K], any finite numbers; -inf, inf or NaN forbids a level.
        costs: [U, K], whole numbers of at least 0; a cost above the budget forbids a level.
        budget: a whole number of at least 0.

    Returns:
        int64 [U], each in [0, K).

    Raises:
        ConfigError: no choice fits, an argument cannot be used, or the table is too large.

    Cost: U K budget / gcd(costs) additions, U budget / gcd table entries.
    """
    table = _build_table(*_read(values, costs), budget)
    return table.trace(int(table.best.argmax()))


def choose_cheapest(
    values: np.ndarray,
    costs: np.ndarray,
    target: float,
    enough: Callable[[np.ndarray], bool],
) -> Int64[np.ndarray, " U"]:
    """Pick exactly one level of every unit: the lowest total cost whose sum of values reaches the target.

    Of choices of that cost the largest sum wins; ties as in `choose_levels`.

    Args:
        values: as in `choose_levels`.
        costs: as in `choose_levels`.
        target: the sum to reach.
        enough: decides on levels whose sum is above the target or within rounding (1e-12) of it.

    Raises:
        ConfigError: no choice reaches the target, or as in `choose_levels`.
    """
    values, costs = _read(values, costs)
    table = _build_table(values, costs, int(np.where(np.isfinite(values), costs, 0).max(1).sum()))
    for cost in np.flatnonzero(table.best >= target - 1e-12 * abs(target)):
        levels = table.trace(int(cost))
        if enough(levels):
            return levels
    raise ConfigError(f"values: no choice of levels reaches {target!r}, the best sum is {table.best.max():.6g}")


def _read(values: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values, -inf where a level is forbidden, and integer costs."""
    values, costs = np.array(values, np.float64), np.asarray(costs)
    if values.ndim != 2 or values.shape != costs.shape or 0 in values.shape:
        raise ConfigError(f"values and costs: expected one shape [units, levels], got {values.shape} and {costs.shape}")
    if costs.dtype.kind not in "iu" or costs.min() < 0:
        raise ConfigError("costs: expected whole numbers of at least 0; count them in a common unit")
    values[~np.isfinite(values)] = -np.inf
    return values, costs.astype(np.int64)


def _build_table(values: np.ndarray, costs: np.ndarray, budget: int) -> _Table:
    """Return the table over exact costs up to the budget, in units of the costs' greatest common divisor."""
    values = np.where(costs <= budget, values, -np.inf)
    if budget < 0 or np.isneginf(values.max(1)).any():
        raise ConfigError(f"budget: no level of some unit fits, got {budget!r}; expected at least the cheapest levels")
    costs = np.where(np.isneginf(values), 0, costs)
    step = max(int(np.gcd.reduce(costs, axis=None)), 1)
    costs, budget = costs // step, min(budget // step, int(costs.max(1).sum()) // step)
    if len(values) * (budget + 1) > MAX_CELLS or values.size * (budget + 1) > MAX_CANDIDATES:
        raise ConfigError(
            f"budget: {values.shape[0]} units of {values.shape[1]} levels at {budget + 1} costs are more than a table "
            f"of {MAX_CELLS:.0e} cells or {MAX_CANDIDATES:.0e} candidates; use a larger unit"
        )
    best, choices = np.zeros(1), []
    for worth, cost in zip(values[::-1], costs[::-1], strict=True):
        best, choice = _add_unit(best, worth, cost, budget)
        choices.append(choice)
    if np.isneginf(best.max()):
        raise ConfigError(f"budget: the cheapest levels together cost more than {budget * step}; raise it")
    return _Table(best, choices[::-1], costs)


def _add_unit(best: np.ndarray, worth: np.ndarray, cost: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Prepend a unit: its best level at every exact total cost. Cost: K vector additions."""
    reach = min(budget, best.size - 1 + int(cost.max()))
    longer, choice = np.full(reach + 1, -np.inf), np.zeros(reach + 1, np.int32)
    for level in np.flatnonzero(~np.isneginf(worth)):
        start = int(cost[level])
        candidate = best[: reach + 1 - start] + worth[level]
        span = slice(start, start + candidate.size)
        better = candidate > longer[span]  # strictly: of equal levels the lower one stays
        np.copyto(longer[span], candidate, where=better)
        np.copyto(choice[span], np.int32(level), where=better)
    return longer, choice


def add_blocks(gains: np.ndarray, unit: int) -> np.ndarray:
    """Return block sums in float64, all added in the same order, so that rounding keeps them non-increasing."""
    blocks = np.zeros((len(gains), -(-gains.shape[1] // unit)))
    for offset in range(min(unit, gains.shape[1])):
        part = gains[:, offset::unit]
        blocks[:, : part.shape[1]] += part
    return blocks


def spend_level(keys: Keys, floor: np.ndarray, cap: np.ndarray, budget: int) -> Int64[np.ndarray, " U"]:
    """Return the pages per unit: `budget` in all, or as the caps allow, by largest key; ties as in `fill_level`.

    Args:
        keys: see `Keys`.
        floor: pages that every unit gets regardless of keys, int64 [U]; their sum is within the budget.
        cap: pages that a unit can get, int64 [U].
        budget: the number of pages.

    Cost: less than 64 probes of U binary searches, each within the bracket of the one before.
    """
    budget = min(budget, int(cap.sum()))
    if budget == floor.sum():
        return floor
    few, many = _find_level(keys, floor, cap, lambda counts: counts.sum() >= budget)
    return fill_level(few, many, budget)


def reach_level(
    keys: Keys, floor: np.ndarray, cap: np.ndarray, enough: Callable[[np.ndarray], bool]
) -> Int64[np.ndarray, " U"]:
    """Return the fewest pages, taken in the order of `spend_level`, that are enough; the caps must be.

    Args:
        keys: see `Keys`.
        floor: as in `spend_level`.
        cap: as in `spend_level`.
        enough: a predicate on pages per unit, monotone: true stays true for more pages.

    Cost: as `spend_level`, and one call of `enough` per probe.
    """
    if enough(floor):
        return floor
    few, many = _find_level(keys, floor, cap, enough)
    low, high = int(few.sum()), int(many.sum())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(fill_level(few, many, middle)) else (middle, high)
    return fill_level(few, many, high)


def _count_above(keys: Keys, level: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return how many pages of each unit have a key of at least `level`, clipped to [low, high]: U binary searches."""
    while (going := low < high).any():
        middle = (low + high) // 2
        above = (keys(np.where(going, middle, 0)) >= level) & going
        low, high = np.where(above, middle + 1, low), np.where(above, high, middle)
    return low


def _find_level(
    keys: Keys, floor: np.ndarray, cap: np.ndarray, enough: Callable[[np.ndarray], bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pages above, and at or above, the highest level that is enough; the floor must not be."""
    few, many = floor, cap
    low, high = 0, int(keys(np.zeros_like(few)).max()) + 1
    while high - low > 1 and (many - few).sum() > 1:  # the level of a single page does not matter
        level = (low + high) // 2
        counts = _count_above(keys, level, few, many)
        if enough(counts):
            low, many = level, counts
        else:
            high, few = level, counts
    return few, many


def fill_level(few: np.ndarray, many: np.ndarray, budget: int) -> np.ndarray:
    """Raise `few` towards `many` up to the budget, always the unit with the fewest pages, ties to the earliest."""
    low, high = 0, int(many.max()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.clip(middle, few, many).sum() <= budget else (low, middle)
    filled = np.clip(low, few, many)
    next_up = np.flatnonzero((few <= low) & (low < many))
    filled[next_up[: budget - int(filled.sum())]] += 1
    return filled
