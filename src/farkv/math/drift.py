"""Drift: does an index still explain the scores of the newest tokens as well as it did when it was fitted?

With rotary positions the mean and the covariance of keys move with every token, even where the text stays of one kind.

In: exact scores of the newest queries on the newest keys, and what an index made of them. Out: the share that it does
not explain, and whether that is worse. Stateless.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float32, Tensor

# The newest queries and keys that are looked at.
QUERIES, KEYS = 64, 256
# Tokens between two looks; after a fit at least a sixteenth of the text, so that all fits together code every token
# anew about sixteen times, however long the text becomes.
EVERY, SHARE_EVERY = 256, 16
# An index is worse that leaves so many times as much unexplained.
WORSE = 1.25


def measure_unexplained(
    exact: Float32[Tensor, "B Hkv N S"],
    estimated: Float32[Tensor, "B Hkv N S"],
    asked: Bool[Tensor, "B N"] | None,
    real: Bool[Tensor, "B S"] | None,
) -> Float32[Tensor, " B"]:
    """Return the share of the variance of exact scores over keys that estimated ones miss, mean over KV heads.

        sum_n var_s(exact - estimated) / sum_n var_s(exact)

    A query's scores may all be moved by a constant: that changes no choice. Heads with scores that are not finite, or
    all alike, do not count; without any other the share is 0.

    Args:
        exact, estimated: of every KV head's queries, its group's side by side.
        asked, real: queries and keys that are no padding; None: all.

    Cost: two passes over the scores.
    """
    weight = exact.new_ones(exact.shape[0], 1, 1, exact.shape[3])
    if real is not None:
        weight = weight * real[:, None, None]
    if asked is not None:
        weight = weight * asked[:, None, :, None]
    missed, whole = (sum_squares(scores, weight) for scores in (exact - estimated, exact))
    known = missed.isfinite() & whole.isfinite() & (whole > 0)
    shares = torch.where(known, missed / whole, 0.0)
    return shares.sum(1) / known.sum(1).clamp_min(1)


def sum_squares(scores: Float32[Tensor, "B Hkv N S"], weight: Float32[Tensor, "B 1 n S"]) -> Float32[Tensor, "B Hkv"]:
    """Return the summed squares of scores less their query's mean, where they have weight."""
    # In 0 times NaN padding would count.
    scores = torch.where(weight > 0, scores, 0.0)
    mean = scores.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1)
    return ((scores - mean).square() * weight).sum((-1, -2))


def is_worse(now: float, then: float) -> bool:
    """Say whether an index leaves clearly more unexplained than it did."""
    return now > WORSE * then


def find_next(n_tokens: int) -> int:
    """Return at how many tokens an index that was fitted to `n_tokens` is looked at."""
    return n_tokens + max(EVERY, n_tokens // SHARE_EVERY)
