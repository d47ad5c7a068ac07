"""Divide a budget of tokens among layers: XKV's problem, solved exactly, and the rules it is compared with.

In: gain curves [L, N]; entry (l, r) is what layer l gains by its (r+1)-th best token. Out: tokens per layer. NumPy
only, stateless.

Every rule but the knapsack is water-filling over a key that decreases along each layer: the page's normalised gain for
XKV (greedy is optimal, since R_l is concave), the layer's missing mass for max-min, a divisor sequence for pyramid
and uniform. Keys are the bit patterns of non-negative float64, which sort like the numbers: bisection finds an
existing key after at most 63 probes.

Source: XKV (arXiv 2412.05896), both problems; PrefixKV (2412.03409), max-min; PyramidKV (2406.02069).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from farkv.config import check_name, show_value
from farkv.errors import ConfigError
from farkv.math import knapsack
from farkv.math.gains import (
    PageRange,
    check_fraction,
    check_one_budget,
    read_gains,
    read_number,
    read_pages,
    read_per_layer,
    read_weights,
)

RULES = ("xkv", "knapsack", "maxmin", "pyramid", "uniform")
# PyramidKV's beta: the last layer gets 1 / beta of the mean budget.
BETA = 20
_ONE = int(np.float64(1).view(np.int64))


def allocate(
    gains: Any,
    *,
    tokens: int | None = None,
    ratio: float | None = None,
    n_bytes: int | None = None,
    retention: float | None = None,
    token_bytes: Any = None,
    weights: Any = None,
    floor: Any = 0,
    cap: Any = None,
    unit: int = 1,
    rule: str = "xkv",
) -> Int64[np.ndarray, " L"]:
    """Return how many tokens each layer keeps: the most retention for a budget, or the least budget for a retention.

    With R_l(c) = sum_{r < c} g_l(r) / sum_r g_l(r), 1 for a row of zeros,

        P1:  max sum_l w_l R_l(c_l)   subject to   sum_l c_l <= budget,             floor_l <= c_l <= cap_l
        P2:  min sum_l c_l            subject to   sum_l w_l R_l(c_l) / sum_l w_l >= retention, in the same box

    P1 spends the whole budget where the caps allow, even on gains of zero. Tied pages go to the layer with the fewest
    tokens, then to the earliest: equal curves get equal budgets. With any rule but the knapsack, no layer gets fewer
    tokens from a larger budget.

    Args:
        gains: [L, N], finite, at least 0; rows must not increase with the rules xkv and maxmin. Any numpy-readable.
        tokens: P1's budget, the sum over layers. Exactly one of tokens, ratio, n_bytes, retention is given.
        ratio: P1's budget as a fraction of L N, in (0, 1].
        n_bytes: P1's budget in bytes.
        retention: P2's target, in (0, 1]. 1 keeps every positive gain.
        token_bytes: with n_bytes, bytes of one token in a layer: one number, or one per layer. Unequal ones need the
            rule xkv or knapsack; `choose_levels` then solves exactly, and leaves bytes unspent that would gain nothing.
        weights: w_l > 0, default 1; for xkv and knapsack.
        floor: fewest tokens of a layer, one number or one per layer; rounded up to pages.
        cap: most tokens of a layer, one number or one per layer, default N; rounded down to pages.
        unit: tokens of a page. A page costs `unit` tokens of the budget even where the row ends inside it.
        rule: `xkv`; `knapsack`, the same problems for gains in any order; `maxmin`, the largest smallest R_l (P2:
            every R_l reaches the retention); `pyramid`, linear decay with depth from 2B - B/20 to B/20; `uniform`.

    Returns:
        int64 [L], min(pages * unit, N).

    Raises:
        ConfigError: an argument is invalid, the budget is below the floors, or the caps rule the retention out.

    Cost: one pass to validate the gains, one to sum them; P2 and maxmin one cumulative sum [L, N] in float64; then less
        than 64 probes of L binary searches. `knapsack`: as `choose_levels`.

    Source: XKV's two problems; floors, caps, pages, weights and byte budgets are ours.
    """
    check_name("rule", rule, RULES)
    if weights is not None and rule not in ("xkv", "knapsack"):
        raise ConfigError(
            f"weights: only the rules xkv and knapsack weigh layers, got rule={show_value(rule)}; leave them out"
        )
    gains = read_gains(gains, ordered=rule in ("xkv", "maxmin"))
    pages = read_pages(gains.shape, floor, cap, unit)
    weight = read_weights(weights, len(gains))
    check_one_budget(token_bytes, tokens=tokens, ratio=ratio, n_bytes=n_bytes, retention=retention)
    if retention is not None:
        check_fraction("retention", retention)
        return pages.count_tokens(_reach(gains, weight, pages, rule, float(retention)))
    sizes = np.ones(len(gains), np.int64)
    if n_bytes is not None:
        budget, sizes = read_number("n_bytes", n_bytes), read_per_layer("token_bytes", token_bytes, len(gains), 1)
    elif ratio is not None:
        check_fraction("ratio", ratio)
        budget = math.floor(ratio * gains.size + 1e-9)
    else:
        budget = read_number("tokens", tokens)
    return pages.count_tokens(_spend(gains, weight, pages, rule, budget, sizes))


def measure_layer_retention(gains: Any, tokens: Any) -> Float64[np.ndarray, " L"]:
    """Return R_l(c_l) per layer: the fraction of its row's sum in the first c_l entries; 1 for a row of zeros.

    Args:
        gains: [L, N], rows in any order.
        tokens: c_l, one number or one per layer, each in [0, N].
    """
    gains = read_gains(gains, ordered=False)
    tokens = read_per_layer("tokens", tokens, len(gains), 0)
    if tokens.max() > gains.shape[1]:
        raise ConfigError(f"tokens: expected at most {gains.shape[1]} per layer, got {tokens.max()}")
    return look_up(accumulate(gains), tokens)


def measure_retention(gains: Any, tokens: Any, weights: Any = None) -> float:
    """Return sum_l w_l R_l(c_l) / sum_l w_l, in the same arithmetic as `allocate`."""
    layers = measure_layer_retention(gains, tokens)
    return float(weigh(layers, read_weights(weights, len(layers))))


def accumulate(gains: np.ndarray) -> np.ndarray:
    """Return the rows' cumulative sums in float64: despite rounding they never decrease, and zeros leave them equal."""
    return np.cumsum(gains, -1, dtype=np.float64)


def look_up(cumulative: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return R_l(c_l), [..., L], from cumulative sums [..., L, N]; never decreasing in tokens, despite rounding."""
    whole = cumulative[..., -1]
    kept = cumulative[..., np.arange(len(tokens)), np.maximum(tokens, 1) - 1] * (tokens > 0)
    return np.where(whole > 0, kept / np.where(whole > 0, whole, 1), 1.0)


def weigh(layers: np.ndarray, weights: np.ndarray) -> Any:
    """Return the weighted mean over layers, the last axis."""
    return (layers * weights).sum(-1) / weights.sum()


def _spend(
    gains: np.ndarray, weights: np.ndarray, pages: PageRange, rule: str, budget: int, sizes: np.ndarray
) -> np.ndarray:
    """Solve P1: pages per layer."""
    equal = bool((sizes == sizes[0]).all())
    least = int((pages.floor * pages.unit * sizes).sum())
    if budget < least:
        raise ConfigError(f"budget: the floors alone need {least}, got {budget}; raise the budget or lower the floor")
    if not equal and rule not in ("xkv", "knapsack"):
        raise ConfigError(f"token_bytes: unequal layers need the rule xkv or knapsack, got rule={rule!r}")
    budget, cost = (budget // (int(sizes[0]) * pages.unit), 1) if equal else (budget, sizes[:, None] * pages.unit)
    if rule == "knapsack" or not equal:
        values, counts = _list_levels(gains, weights, pages)
        chosen = knapsack.choose_levels(values, counts * cost, budget)
        # Any pages left over gain nothing.
        return knapsack.fill_level(chosen, pages.cap, budget) if equal else chosen
    return knapsack.spend_level(_make_keys(gains, weights, pages, rule), pages.floor, pages.cap, budget)


def _reach(gains: np.ndarray, weights: np.ndarray, pages: PageRange, rule: str, rho: float) -> np.ndarray:
    """Solve P2: pages per layer."""
    cumulative = accumulate(gains)
    # By rounding, a sum may reach 1 before the last positive gain: positive gains are counted instead.
    needed = _count_positive(gains, pages.unit) if rho == 1 else pages.floor

    def measure(counts: np.ndarray) -> float:
        layers = look_up(cumulative, pages.count_tokens(counts))
        return float(layers.min() if rule == "maxmin" else weigh(layers, weights))

    def enough(counts: np.ndarray) -> bool:
        return bool((counts >= needed).all()) and measure(counts) >= rho

    if not enough(pages.cap):
        best = measure(pages.cap)
        raise ConfigError(f"retention: the caps allow {best:.6g} at most, got {rho!r}; raise the cap or ask for less")
    if rho == 1 and rule not in ("pyramid", "uniform"):
        return np.maximum(pages.floor, needed)
    if rule == "knapsack":
        return knapsack.choose_cheapest(*_list_levels(gains, weights, pages), rho * float(weights.sum()), enough)
    return knapsack.reach_level(_make_keys(gains, weights, pages, rule), pages.floor, pages.cap, enough)


def _count_positive(gains: np.ndarray, unit: int) -> np.ndarray:
    """Return the pages of each layer up to its last positive gain."""
    tokens = (gains.shape[1] - (gains[:, ::-1] > 0).argmax(1)) * (gains.max(1) > 0)
    return -(-tokens // unit)


def _list_levels(gains: np.ndarray, weights: np.ndarray, pages: PageRange) -> tuple[np.ndarray, np.ndarray]:
    """Return w_l R_l for every number of pages, -inf out of range, and these numbers; both [L, pages + 1]."""
    cumulative, counts = accumulate(gains), np.arange(pages.cap.max() + 1)
    kept, whole = np.pad(cumulative, ((0, 0), (1, 0)))[:, pages.count_tokens(counts)], cumulative[:, -1:]
    layers = np.where(whole > 0, kept / np.where(whole > 0, whole, 1), 1.0)
    outside = (counts < pages.floor[:, None]) | (counts > pages.cap[:, None])
    return np.where(outside, -np.inf, layers * weights[:, None]), np.broadcast_to(counts, layers.shape)


def _make_keys(gains: np.ndarray, weights: np.ndarray, pages: PageRange, rule: str) -> knapsack.Keys:
    """Return a function from one page number per layer to these pages' keys: int64 >= 0, decreasing along a layer."""
    layer = np.arange(len(gains))
    if rule == "xkv":
        whole = gains.sum(1, dtype=np.float64)
        whole[whole == 0] = 1
        blocks = gains if pages.unit == 1 else knapsack.add_blocks(gains, pages.unit)
        # + 0.0 turns -0.0, whose bits are negative, into 0.0.
        return lambda page: (blocks[layer, page] / whole * weights + 0.0).view(np.int64)
    if rule == "maxmin":
        cumulative = accumulate(gains)
        return lambda page: _ONE - look_up(cumulative, pages.count_tokens(page)).view(np.int64)
    # Page j of a layer with weight s has the key s / (j + 1/2): Webster's method, exact in the sum and nested.
    quota = np.ones(len(gains))
    if rule == "pyramid" and len(gains) > 1:
        quota = np.linspace(2 - 1 / BETA, 1 / BETA, len(gains))
    return lambda page: (quota / (page + 0.5)).view(np.int64)
