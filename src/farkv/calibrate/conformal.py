"""Allocations for unseen prompts: the paper's mean of allocations, and one with a conformal retention guarantee.

In: gain curves of sample prompts [n, L, N], on one grid. Out: tokens per layer. NumPy only, stateless.

Source: split conformal prediction (Papadopoulos et al. 2002; Vovk, Gammerman, Shafer 2005; Lei et al. 2018).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from farkv.config import is_number, show_value
from farkv.errors import ConfigError
from farkv.math.allocate import accumulate, allocate, look_up, weigh
from farkv.math.gains import check_fraction, read_gains, read_pages, read_weights


class Promise(NamedTuple):
    """An allocation whose retention holds for unseen prompts with the given confidence.

    `tokens` is int64 [L], `budget` the tokens that `allocate` was given, `n_calibration` the calibration samples.
    """

    tokens: Int64[np.ndarray, " L"]
    budget: int
    n_calibration: int
    confidence: float


def average_allocations(samples: Any, **budget: Any) -> Int64[np.ndarray, " L"]:
    """Return the rounded mean of the samples' own allocations: the paper's rule for unseen prompts.

    It optimises no objective, and a retention target does not transfer: with retention=0.9 most unseen prompts may
    retain less. Averaging the curves and allocating once is optimal for the samples' mean retention; `allocate_promise`
    gives a guarantee.

    Args:
        samples: [n, L, N], each as `allocate` takes it.
        budget: the keywords of `allocate`.

    Returns:
        int64 [L]; rounded half to even, so the sum may differ from the budget.

    Raises:
        ConfigError: there are no samples, or as in `allocate`.

    Source: XKV's released code.
    """
    samples = read_gains(samples, ordered=False, rank=3)
    return np.rint(np.mean([allocate(sample, **budget) for sample in samples], 0)).astype(np.int64)


def allocate_promise(
    fit: Any,
    calibration: Any,
    *,
    retention: float,
    confidence: float = 0.9,
    weights: Any = None,
    floor: Any = 0,
    cap: Any = None,
    unit: int = 1,
) -> Promise:
    """Return the smallest allocation of a nested family that reaches the retention on an unseen prompt.

    The family is c(b) = allocate(mean of fit, tokens=b). A calibration sample's score is the least b with
    R(c(b)) >= retention; the budget is the k-th smallest score, k = ceil((n + 1) confidence) of n samples.

    The guarantee: if calibration prompts and the unseen one are exchangeable, and fit is chosen without them, then

        confidence <= P[R_unseen(c(budget)) >= retention] <= confidence + 1 / (n + 1)

    where the upper bound requires scores without ties. The guarantee is marginal: it also averages over the draw of the
    calibration prompts, and does not hold for each calibration set or each kind of prompt.

    Args:
        fit: [n1, L, N] gain curves, rows non-increasing; rows are normalised, so that no prompt dominates by scale.
        calibration: [n2, L, N] gain curves, disjoint from fit.
        retention: in (0, 1], the weighted mean over layers of the fraction of mass kept.
        confidence: in (0, 1).
        weights: as in `allocate`; floor, cap and unit too.

    Raises:
        ConfigError: too few calibration samples for the confidence, shapes differ, the caps make the retention
            unreachable, or as in `allocate`.

    Cost: log2(L N / unit) allocations and look-ups in [n2, L, N] cumulative sums in float64.

    Source: Lei et al., Distribution-Free Predictive Inference for Regression, JASA 2018, theorem 2.2.
    """
    fit, calibration = read_gains(fit, ordered=True, rank=3), read_gains(calibration, ordered=True, rank=3)
    if fit.shape[1:] != calibration.shape[1:]:
        raise ConfigError(f"calibration: expected [n, L, N] like fit's {fit.shape}, got {calibration.shape}")
    check_fraction("retention", retention)
    box, weight = read_pages(fit.shape[1:], floor, cap, unit), read_weights(weights, fit.shape[1])
    rank, low, high = _find_rank(len(calibration), confidence), int(box.floor.sum()), int(box.cap.sum())
    mean, mass = _average_curves(fit)
    cumulative, target = accumulate(calibration), float(retention)

    def spend(pages: int) -> np.ndarray:
        return allocate(mean, tokens=pages * unit, weights=weight * mass, floor=floor, cap=cap, unit=unit)

    def enough(tokens: np.ndarray) -> bool:
        return int((weigh(look_up(cumulative, tokens), weight) >= target).sum()) >= rank

    if enough(spend(low)):
        high = low
    elif not enough(spend(high)):
        retained = np.sort(weigh(look_up(cumulative, spend(high)), weight))
        raise ConfigError(
            f"retention: the caps allow at most {retained[-rank]:.6g} at this confidence, got {retention!r}; "
            "raise the caps or lower the retention"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(spend(middle)) else (middle, high)
    return Promise(spend(high), high * unit, len(calibration), confidence)


def _average_curves(fit: np.ndarray) -> tuple[np.ndarray, Float64[np.ndarray, " L"]]:
    """Return the mean of the samples' normalised rows, and each layer's mass: below 1 where some rows are all zero."""
    whole = fit.sum(-1, keepdims=True, dtype=np.float64)
    mass = (whole[..., 0] > 0).mean(0)
    return (fit / np.where(whole > 0, whole, 1)).mean(0), np.where(mass > 0, mass, 1)


def _find_rank(n: int, confidence: float) -> int:
    """Return ceil((n + 1) confidence); raise ConfigError if that exceeds n."""
    if not is_number(confidence) or not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {show_value(confidence)}")
    # Tolerance for decimal fractions in binary: 30 * 0.9 must not become 28.
    rank = math.ceil((n + 1) * confidence - 1e-9)
    if rank > n:
        needed = math.ceil(confidence / (1 - confidence) - 1e-9)
        raise ConfigError(
            f"calibration: confidence {confidence} needs {needed} samples, got {n}; add samples or lower the confidence"
        )
    return rank
