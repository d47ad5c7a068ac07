"""Which drafted tokens stand: speculative decoding's rule, with random numbers that belong to positions.

In: drafted tokens, what they were drawn from, the logits of full attention. Out: the token that stands at a position.
By the rule (Leviathan et al. 2023, algorithm 1; Chen et al. 2023) a token that was drawn from q stays with probability
min(1, p / q), else one is drawn from what p has more than q: what stands is distributed as p, whatever q is.

Deviation: uniform numbers are of (seed, row, position), not of a stream. A position's token is drawn by the same
numbers whether it was drafted or not, so that a seed gives nearly always the same text whatever is drafted, however
many at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Float32, Tensor

# What a position's random numbers are for.
_DRAW, _KEEP, _REST = range(3)
# Odd numbers far from each other: seeds of neighbouring positions must not be neighbours.
_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = (1 << 64) - 1


class Noise(NamedTuple):
    """The random numbers of one row's tokens; None as seed: none, the likeliest token is taken."""

    seed: int | None
    row: int = 0

    def draw(self, log_p: Float32[Tensor, " V"], position: int, use: int = _DRAW) -> int:
        """Return the token drawn at a position from log-probabilities, normalised or not, by Gumbel's rule.

        A deliberate sync.
        """
        if self.seed is None:
            return int(log_p.argmax())
        exponential = torch.empty(log_p.shape[-1]).exponential_(generator=self.seed_at(position, use))
        return int((log_p - exponential.log().to(log_p.device)).argmax())

    def keep(self, ratio: float, position: int) -> bool:
        """Say with probability min(1, ratio) that a drafted token stays."""
        if self.seed is None:
            return ratio >= 1
        return float(torch.rand((), generator=self.seed_at(position, _KEEP))) < ratio

    def seed_at(self, position: int, use: int) -> torch.Generator:
        """Return the numbers of a position for one use."""
        assert self.seed is not None
        mixed = self.seed
        for part in (self.row, position, use):
            mixed = ((mixed ^ (part * _MIX[0])) * _MIX[1]) & _BITS
            mixed = ((mixed ^ (mixed >> 31)) * _MIX[2]) & _BITS
        return torch.Generator().manual_seed(mixed ^ (mixed >> 29))


class Drafted(NamedTuple):
    """A drafted token, and the log-probabilities that it was drawn from; None: it was copied, from nowhere else."""

    token: int
    log_q: Float32[Tensor, " V"] | None


def settle(drafted: Drafted | None, log_p: Float32[Tensor, " V"], noise: Noise, position: int) -> int:
    """Return the token that stands at a position: the drafted one, or one that full attention draws instead.

    Args:
        drafted: None where nothing was drafted.
        log_p: log-probabilities of full attention, after all that was asked for (temperature, top-k, top-p).

    Cost: a deliberate sync.
    """
    if drafted is None or noise.seed is None:
        return noise.draw(log_p, position)
    token, log_q = drafted
    p = float(log_p[token].exp())
    q = 1.0 if log_q is None else float(log_q[token].exp())
    if noise.keep(p / max(q, 1e-38), position):
        return token
    rest = log_p.exp()
    if log_q is None:
        rest[token] = 0
    else:
        rest = (rest - log_q.exp()).clamp_(min=0)
    if float(rest.sum()) <= 0:
        # Alike to rounding: what is left of p is p.
        rest = log_p.exp()
    return noise.draw(rest.log(), position, _REST)
