"""Compare predictions under teacher forcing: KL and top-1 to the full cache at the same tokens.

In: log-probabilities of a method and of the full cache at the places of an answer. Out: means. They need no skill of
the model: where it cannot answer, it still predicts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from farkv._axes import Float32, Tensor

# Long answers are also compared part by part; an answer with fewer places than this is not long.
PARTS, LEAST_PLACES = 8, 64
# Of a long answer, predictions are kept at so many places at most.
KEPT_PLACES = 256


class Closeness(NamedTuple):
    """How near predictions are to the full cache's: sums over places, in nats, and equal first choices."""

    kl: float
    same: int
    places: int


def space_places(n: int) -> int:
    """Return that predictions are kept at every n-th place of an answer of so many tokens."""
    return -(-n // KEPT_PLACES)


def measure(full: Float32[Tensor, "N V"], logs: Float32[Tensor, "N V"]) -> tuple[Tensor, Tensor]:
    """Return KL(full || method) in nats and whether the likeliest tokens are the same, at every place."""
    kl = (full.exp() * (full - logs)).sum(-1).clamp_min(0)
    return kl, full.argmax(-1) == logs.argmax(-1)


def compare_turn(full: Tensor, logs: Tensor) -> tuple[Closeness, dict[str, Any]]:
    """Return a turn's closeness, and what its record says: means, and of a long answer means along the way."""
    kl, same = measure(full, logs)
    found = Closeness(float(kl.sum()), int(same.sum()), len(kl))
    record: dict[str, Any] = {"kl": found.kl / found.places, "top1": found.same / found.places}
    if found.places >= LEAST_PLACES:
        record["kl_along"] = [round(float(part.mean()), 6) for part in kl.chunk(PARTS)]
    return found, record


def average(turns: list[Closeness]) -> tuple[float, float]:
    """Return the means over all places of all turns: KL in nats, share of equal first choices."""
    places = sum(turn.places for turn in turns)
    return sum(turn.kl for turn in turns) / places, sum(turn.same for turn in turns) / places


def compare_continuation(full: Tensor, logs: Tensor, goal: Tensor) -> dict[str, float]:
    """Return what a row says of a known continuation: score (right first choices), nll, kl, top1."""
    kl, same = measure(full, logs)
    at = torch.arange(len(goal))
    return {
        "score": float((logs.argmax(-1) == goal).float().mean()),
        "nll": float(-logs[at, goal].mean()),
        "kl": float(kl.mean()),
        "top1": float(same.float().mean()),
    }
