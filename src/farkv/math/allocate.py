"""Divide a budget of tokens among layers: what XKV solves, exactly, and the rules it is compared with.

In: gain curves [L, N], entry (l, r) is what layer l gains by its (r+1)-th best token. Out: tokens per layer. Numpy
only, keeps nothing.

Every rule but the knapsack is a water level over a key that falls along each layer: the page's normalised gain for
XKV (greedy is optimal, since R_l is concave), what the layer still misses for max-min, a divisor sequence for pyramid
and uniform. Keys are the bit patterns of non-negative float64, whose order is that of the numbers: bisection ends at
an existing key after at most 63 probes.

Source: XKV (arXiv 2412.05896), both problems; PrefixKV (2412.03409), max-min; PyramidKV (2406.02069).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from farkv.errors import ConfigError
from farkv.math import knapsack

RULES = ("xkv", "knapsack", "maxmin", "pyramid", "uniform")
# PyramidKV's: the last layer gets the mean over beta.
BETA = 20
_ONE = int(np.float64(1).view(np.int64))


class Pages(NamedTuple):
    """Between `floor` and `cap` pages per layer, each of `unit` tokens; a row of `n_tokens` may end inside the last."""

    floor: np.ndarray
    cap: np.ndarray
    unit: int
    n_tokens: int

    def count_tokens(self, pages: np.ndarray) -> np.ndarray:
        """Return the tokens in so many pages of each layer."""
        return np.minimum(pages * self.unit, self.n_tokens)


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

    P1 spends the whole budget where the caps allow, on gains of zero too. Tied pages go to the layer that has the
    fewest tokens, the earlier of equal ones: equal curves give equal shares. With any rule but the knapsack a larger
    budget takes from no layer.

    Args:
        gains: [L, N], finite, at least 0; rows must not increase with the rules xkv and maxmin. Any numpy-readable.
        tokens: P1's budget, the sum over layers. Exactly one of tokens, ratio, n_bytes, retention is given.
        ratio: P1's budget as a share of L N, in (0, 1].
        n_bytes: P1's budget in bytes.
        retention: P2's target, in (0, 1]. 1 keeps every positive gain.
        token_bytes: with n_bytes, bytes of one token in a layer: one number, or one per layer. Unequal ones are
            solved exactly by `choose_levels`, which leaves bytes unspent that would gain nothing (xkv and knapsack).
        weights: w_l > 0, default 1; for xkv and knapsack.
        floor: least tokens of a layer, one number or one per layer; rounded up to pages.
        cap: most tokens of a layer, one number or one per layer, default N; rounded down to pages.
        unit: tokens of a page. A page costs `unit` tokens of the budget even where the row ends inside it.
        rule: `xkv`; `knapsack`, the same problems for gains in any order; `maxmin`, the largest smallest R_l (P2:
            every R_l reaches the retention); `pyramid`, linear decay with depth from 2B - B/20 to B/20; `uniform`.

    Returns:
        int64 [L], min(pages * unit, N).

    Raises:
        ConfigError: an argument cannot be used, the budget is below the floors, or caps put retention out of reach.

    Cost: one pass over gains to check, one to add; P2 and maxmin one cumulative sum [L, N] in float64; then less
        than 64 probes of L binary searches. `knapsack`: as `choose_levels`.

    Source: XKV's two problems; floors, caps, pages, weights and bytes are ours.
    """
    if rule not in RULES:
        raise ConfigError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if weights is not None and rule not in ("xkv", "knapsack"):
        raise ConfigError(f"weights: only the rules xkv and knapsack weigh layers, got rule={rule!r}; leave them out")
    gains = read_gains(gains, ordered=rule in ("xkv", "maxmin"))
    pages = read_pages(gains.shape, floor, cap, unit)
    weight = read_weights(weights, len(gains))
    _check_one_budget(token_bytes, tokens=tokens, ratio=ratio, n_bytes=n_bytes, retention=retention)
    if retention is not None:
        check_share("retention", retention)
        return pages.count_tokens(_reach(gains, weight, pages, rule, float(retention)))
    sizes = np.ones(len(gains), np.int64)
    if n_bytes is not None:
        budget, sizes = _read_count("n_bytes", n_bytes), _read_per_layer("token_bytes", token_bytes, len(gains), 1)
    elif ratio is not None:
        check_share("ratio", ratio)
        budget = math.floor(ratio * gains.size + 1e-9)
    else:
        budget = _read_count("tokens", tokens)
    return pages.count_tokens(_spend(gains, weight, pages, rule, budget, sizes))


def measure_layer_retention(gains: Any, tokens: Any) -> Float64[np.ndarray, " L"]:
    """Return R_l(c_l) of every layer: the share of its row's sum that its first c_l entries hold; 1 for a zero row.

    Args:
        gains: [L, N], rows in any order.
        tokens: c_l, one number or one per layer, each in [0, N].
    """
    gains = read_gains(gains, ordered=False)
    tokens = _read_per_layer("tokens", tokens, len(gains), 0)
    if tokens.max() > gains.shape[1]:
        raise ConfigError(f"tokens: expected at most {gains.shape[1]} per layer, got {tokens.max()}")
    return look_up(accumulate(gains), tokens)


def measure_retention(gains: Any, tokens: Any, weights: Any = None) -> float:
    """Return sum_l w_l R_l(c_l) / sum_l w_l, in the very arithmetic in which `allocate` reaches a retention."""
    layers = measure_layer_retention(gains, tokens)
    return float(weigh(layers, read_weights(weights, len(layers))))


def accumulate(gains: np.ndarray) -> np.ndarray:
    """Return the cumulative sums of rows in float64. Rounding keeps them from falling, and zeros change nothing."""
    return np.cumsum(gains, -1, dtype=np.float64)


def look_up(cumulative: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return R_l(c_l), [..., L], from cumulative sums [..., L, N]; rounding keeps it from falling as tokens grow."""
    whole = cumulative[..., -1]
    kept = cumulative[..., np.arange(len(tokens)), np.maximum(tokens, 1) - 1] * (tokens > 0)
    return np.where(whole > 0, kept / np.where(whole > 0, whole, 1), 1.0)


def weigh(layers: np.ndarray, weights: np.ndarray) -> Any:
    """Return the weighted mean over layers, the last axis."""
    return (layers * weights).sum(-1) / weights.sum()


def _spend(
    gains: np.ndarray, weights: np.ndarray, pages: Pages, rule: str, budget: int, sizes: np.ndarray
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
        # Pages that are left gain nothing.
        return knapsack.fill_level(chosen, pages.cap, budget) if equal else chosen
    return knapsack.spend_level(_make_keys(gains, weights, pages, rule), pages.floor, pages.cap, budget)


def _reach(gains: np.ndarray, weights: np.ndarray, pages: Pages, rule: str, rho: float) -> np.ndarray:
    """Solve P2: pages per layer."""
    cumulative = accumulate(gains)
    # Rounding may let a sum reach 1 before its last positive gain: then those are counted, not added.
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


def _list_levels(gains: np.ndarray, weights: np.ndarray, pages: Pages) -> tuple[np.ndarray, np.ndarray]:
    """Return w_l R_l of every number of pages, -inf outside the box, and that number; both [L, pages + 1]."""
    cumulative, counts = accumulate(gains), np.arange(pages.cap.max() + 1)
    kept, whole = np.pad(cumulative, ((0, 0), (1, 0)))[:, pages.count_tokens(counts)], cumulative[:, -1:]
    layers = np.where(whole > 0, kept / np.where(whole > 0, whole, 1), 1.0)
    outside = (counts < pages.floor[:, None]) | (counts > pages.cap[:, None])
    return np.where(outside, -np.inf, layers * weights[:, None]), np.broadcast_to(counts, layers.shape)


def _make_keys(gains: np.ndarray, weights: np.ndarray, pages: Pages, rule: str) -> knapsack.Keys:
    """Return the function from a page number per layer to the pages' keys: int64 >= 0, falling along a layer."""
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
    # Page number j of a share s is due at level s / (j + 1/2): Webster's rounding, exact in the sum and nested.
    share = np.ones(len(gains))
    if rule == "pyramid" and len(gains) > 1:
        share = np.linspace(2 - 1 / BETA, 1 / BETA, len(gains))
    return lambda page: (share / (page + 0.5)).view(np.int64)


def read_gains(gains: Any, *, ordered: bool, rank: int = 2) -> np.ndarray:
    """Return gains as a float32 or float64 array of that rank, uncopied where it is one, or raise ConfigError."""
    try:
        array = np.asarray(gains)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"gains: numpy cannot read them ({error}); pass gains.detach().float().cpu()") from error
    if array.ndim != rank or 0 in array.shape or array.dtype.kind not in "fiu":
        raise ConfigError(f"gains: expected {rank} axes of real numbers, got {array.dtype} of shape {array.shape}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    rows = array.reshape(-1, array.shape[-1])
    # One pass: where rows fall, their ends bound the rest, and NaN falls nowhere.
    falling = ordered and all(bool((row[1:] <= row[:-1]).all()) for row in rows)
    least, most = (rows[:, -1].min(), rows[:, 0].max()) if falling else (rows.min(), rows.max())
    if not (least >= 0 and float(most) <= np.finfo(np.float64).max / rows.shape[1]):
        raise ConfigError(f"gains: expected numbers of at least 0 with finite sums, got from {least} to {most}")
    if ordered and not falling:
        raise ConfigError("gains: expected rows that never increase; sort them, or use rule='knapsack'")
    return array


def read_weights(weights: Any, n_layers: int) -> Float64[np.ndarray, " L"]:
    """Return the layers' weights, ones for None, or raise ConfigError."""
    if weights is None:
        return np.ones(n_layers)
    array = np.asarray(weights, np.float64)
    if array.shape != (n_layers,) or not (np.isfinite(array) & (array > 0)).all():
        raise ConfigError(f"weights: expected {n_layers} positive numbers, got {weights!r}")
    return array


def check_share(name: str, share: float) -> None:
    """Raise ConfigError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise ConfigError(f"{name}: expected a number in (0, 1], got {share!r}")


def _check_one_budget(token_bytes: Any, **budgets: float | None) -> None:
    given = [name for name, budget in budgets.items() if budget is not None]
    if len(given) != 1:
        raise ConfigError(f"budget: give exactly one of {', '.join(budgets)}; got {' and '.join(given) or 'none'}")
    if (token_bytes is None) == (given == ["n_bytes"]):
        raise ConfigError(f"token_bytes: give it with n_bytes, and only then; got {token_bytes!r} with {given[0]}")


def read_pages(shape: tuple[int, ...], floor: Any, cap: Any, unit: int) -> Pages:
    """Return the box that floor and cap leave, in whole pages, or raise ConfigError."""
    n_layers, n_tokens = shape
    unit = _read_count("unit", unit, 1)
    least, most = -(-_read_per_layer("floor", floor, n_layers, 0) // unit), np.full(n_layers, -(-n_tokens // unit))
    if cap is not None:
        most = np.minimum(most, _read_per_layer("cap", cap, n_layers, 0) // unit)
    if (least > most).any():
        layer = int((least > most).argmax())
        raise ConfigError(
            f"floor: layer {layer} needs {least[layer]} pages of {unit}, and its cap and row allow {most[layer]}; "
            "lower the floor or raise the cap"
        )
    return Pages(least, most, unit, n_tokens)


def _read_count(name: str, number: Any, least: int = 0) -> int:
    return int(_read_per_layer(name, number, 1, least)[0])


def _read_per_layer(name: str, numbers: Any, n_layers: int, least: int) -> Int64[np.ndarray, " L"]:
    array = np.asarray(numbers)
    if array.dtype.kind not in "iu" or array.shape not in ((), (n_layers,)) or (array < least).any():
        many = "" if n_layers == 1 else f", or one for each of {n_layers} layers"
        raise ConfigError(f"{name}: expected a whole number >= {least}{many}; got {numbers!r}")
    return np.broadcast_to(array, n_layers).astype(np.int64)
