"""Reads that stand for what is not read: records are drawn by their weight, and weighed by how likely that was.

The best records leave out the same ones at every step, so that an error of one sign is made. Here record s, of
estimated weight w_s, gets a number u_s in (0, 1); the `cap` largest w_s / u_s are read. With tau the largest that is
not, a record was certain to be read where w_s >= tau, and else had the probability w_s / tau, whatever its true weight
is: its logit is raised by log(tau / w_s), and the sum over what is read equals, in the mean, the sum over all (but for
half a record of those that are drawn: u is even, and tau the upper end of a gap).

In: log weights, seeds. Out: positions, and what to add to their logits (`odds`). Deterministic: u follows from the
layer, the KV head, the number of tokens and the record's place.

Source: priority sampling (Duffield, Lund and Thorup, 2007, J. ACM 54(6)); with u of a golden-ratio sequence, which
is even over any stretch of the text (deviation: u is not independent, which spreads less).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from farkv._axes import Bool, Float, Float32, Int, Tensor
from farkv.math.select import Choice

GOLDEN, MASK = 2654435769, 0xFFFFFFFF


def make_seeds(layer: int, tokens: list[int], sampled: Bool[Tensor, "b Hkv"]) -> Int[Tensor, "B Hkv"]:
    """Return the seed of every head's draws at a step, -1 where it is not sampled.

    Args:
        tokens: of every sequence.
        sampled: in host memory.
    """
    # Finalised so that neighbours have nothing in common. Plain numbers, and numpy's: an operation of torch between two
    # kernels takes ten times as long.
    x = [(n * 0x85EBCA77 + layer * 0xC2B2AE3D) & MASK for n in tokens]
    x = [((n ^ (n >> 15)) * 0x2C1B3C6D) & MASK for n in x]
    x = [((n ^ (n >> 12)) * 0x297A2D39) & MASK for n in x]
    own = np.array([[n ^ (n >> 15)] for n in x]) + spread_heads(sampled.shape[1])
    return torch.from_numpy(np.where(sampled.numpy(), own & MASK, -1))


@cache
def spread_heads(n_heads: int) -> np.ndarray:
    """Return what heads' seeds differ by: any few of them are spread evenly, and not by what places differ by."""
    return np.arange(n_heads) * 0xC2B2AE35


def draw(seeds: Int[Tensor, "B Hkv"], places: Int[Tensor, "b h S"]) -> Float32[Tensor, "B Hkv S"]:
    """Return u in (0, 1), 23 bits of frac(place * golden ratio + seed); 1 where the seed is -1."""
    x = (places * GOLDEN + seeds[..., None]) & MASK
    return torch.where(seeds[..., None] < 0, 1.0, ((x >> 9).float() + 0.5) * 2.0**-23)


def sample_top(
    log_weights: Float32[Tensor, "B Hkv S"],
    cap: int,
    seeds: Int[Tensor, "B Hkv"],
    valid: Bool[Tensor, "b h S"] | None = None,
    own: Int[Tensor, "b 1 1"] | None = None,
) -> Choice:
    """Draw `cap` records of every KV head; of a head that is not sampled, the best. Cost: a top-k over S per KV head.

    Args:
        log_weights: logs of weights that sum to 1 over S, mean over a query group; +inf where a record is forced.
        valid: real tokens: places are counted among them.
        own: each sequence's own cap, at most `cap`; None where all have the same.
    """
    n = log_weights.shape[-1]
    places = torch.arange(n, device=log_weights.device)[None, None] if valid is None else valid.cumsum(-1) - 1
    ranks = log_weights - draw(seeds, places).log()
    values, positions = ranks.topk(min(cap + 1, n), -1)
    limit = torch.full((1, 1, 1), cap, device=ranks.device) if own is None else own
    next_one = values.gather(-1, limit.clamp_max(values.shape[-1] - 1).expand(*values.shape[:2], 1))
    next_one = next_one.masked_fill(limit >= n, -torch.inf)
    keep = (torch.arange(values.shape[-1], device=values.device) < limit) & (values > -torch.inf)
    odds = (next_one - log_weights.gather(-1, positions)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    odds = odds.masked_fill((seeds < 0)[..., None], 0.0)
    key, order = torch.where(keep, positions, positions + n).sort(-1)
    key, odds = key[..., :cap], odds.gather(-1, order)[..., :cap]
    is_whole = own is None and valid is None
    return Choice(torch.where(key >= n, key - n, key), None if is_whole else key < n, odds=odds)


class Seen(NamedTuple):
    """A sample of a prompt: queries, times the softmax scaling, and records.

    told: the same logits as the index tells them.  visible: which records each query may see.  forced: which of them
    are read in any case.
    """

    queries: Float[Tensor, "B Hkv G M D"]
    keys: Float[Tensor, "B Hkv N D"]
    values: Float[Tensor, "B Hkv N Dv"]
    told: Float32[Tensor, "B Hkv G M N"]
    visible: Bool[Tensor, "b h 1 M N"]
    forced: Bool[Tensor, "b h 1 M N"]


def find_gains(seen: Seen, fraction: float, thinned: float) -> Bool[Tensor, "B Hkv"]:
    """Say which KV heads should be sampled, by the error that both ways leave in the attention of a prompt's queries.

    Both read `fraction` of a sample of the prompt's records. What is drawn errs the less the more is drawn: its squared
    error falls with the number of records.

    Args:
        thinned: the prompt's records over those of the sample.

    Cost: 2 G M N (D + 3 Dv) operations per KV head, two top-k over N for each of M queries.
    """
    queries, keys, values, told, visible, forced = seen
    # A group's queries side by side: keys and values are read once.
    true = (queries.float().flatten(2, 3) @ keys.float().mT).unflatten(2, queries.shape[2:4])
    true = true.masked_fill(~visible, -torch.inf)
    values = values.float()
    whole = true.softmax(-1).flatten(2, 3) @ values
    logs = told.masked_fill(~visible, -torch.inf).log_softmax(-1).logsumexp(2) - math.log(told.shape[2])
    logs = logs.masked_fill(forced[:, :, 0], torch.inf)
    caps = (visible[:, :, 0].sum(-1, keepdim=True) * fraction).long().clamp_min(1).expand(*logs.shape[:3], 1)
    # One seed for every query, whatever the head: what is compared is two ways of reading, not heads.
    n_queries, n = logs.shape[2:]
    seeds = torch.arange(n_queries, device=logs.device)[None] * 0x9E3779
    drawn = draw(seeds, torch.arange(n, device=logs.device)[None, None]).log()[0]
    # A deliberate sync, once per head of a fit.
    most = min(int(caps.max()) + 1, n)
    errors: list[Tensor] = []
    for ranks in (logs, logs - drawn):
        limit = ranks.topk(most, -1).values.gather(-1, caps.clamp_max(most - 1))
        # Not a number, where nothing can be told, stays so: such a head is not drawn.
        odds = torch.zeros_like(logs) if ranks is logs else (limit - logs).clamp_min(0)
        chosen = torch.where(ranks <= limit, -torch.inf, odds)
        read = (true + chosen[:, :, None]).softmax(-1).flatten(2, 3) @ values
        errors.append((read - whole).square().sum((2, 3)))
    best, sampled = errors
    return sampled / thinned < best
