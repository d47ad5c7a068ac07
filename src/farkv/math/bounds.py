"""Bounds of whole pages of keys, and the largest logit that they allow (Quest).

In: keys, a query. Out: per page and KV head the minimum and maximum of every key coordinate; upper bounds of
logits; token scores that rank whole pages. No host sync, no loop over heads.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.math.logits import Logits


def bound_pages(
    k: Float[Tensor, "B Hkv T D"], valid: Bool[Tensor, "b h T"] | None, page: int, before: int = 0
) -> Float[Tensor, "B Hkv P D2"]:
    """Return min_t k_td and max_t k_td of every page, side by side, in the keys' dtype.

    A page without a real key gets the dtype's largest number as its minimum and the smallest as its maximum: neutral
    elements, so that real keys appended later set its bounds alone.

    Args:
        valid: False on padding, which is ignored; None where all are real.
        before: tokens of the first page that come before these keys.

    Cost: two passes over the keys.

    Source: Quest (Tang et al. 2024), section 3.3.
    """
    limits = torch.finfo(k.dtype)
    ends = (0, 0, before, -(before + k.shape[2]) % page)
    low = high = k
    if valid is not None:
        low, high = (k.masked_fill(~valid[..., None], value) for value in (limits.max, limits.min))
    low = torch.nn.functional.pad(low, ends, value=limits.max).unflatten(2, (-1, page)).amin(3)
    high = torch.nn.functional.pad(high, ends, value=limits.min).unflatten(2, (-1, page)).amax(3)
    return torch.cat([low, high], -1)


def score_bounds(
    q: Float[Tensor, "B Hq 1 D"], bounds: Float[Tensor, "B Hkv P D2"], logits: Logits
) -> Float32[Tensor, "B Hkv G P"]:
    """Return an upper bound of the logits of every page: scaling * sum_d max(q_d min_d, q_d max_d).

    The larger product is that with max_d where q_d > 0, and that with min_d where q_d < 0: one matrix product with the
    query's negative and positive parts side by side.

    Cost: P * 2D numbers read per KV head; 4 Hq P D operations.

    Source: Quest (Tang et al. 2024), algorithm 1.
    """
    batch, kv_heads = bounds.shape[:2]
    grouped = q.float().reshape(batch, kv_heads, -1, q.shape[-1])
    parts = torch.cat([grouped.clamp(max=0), grouped.clamp(min=0)], -1)
    return logits.cap(parts @ bounds.float().mT * logits.scaling)


def mark_pages(valid: Bool[Tensor, "b h S"], page: int) -> Bool[Tensor, "b h P"]:
    """Return which pages hold a real token."""
    return torch.nn.functional.pad(valid, (0, -valid.shape[-1] % page)).unflatten(-1, (-1, page)).any(-1)


def rank_tokens(pooled: Float32[Tensor, "B Hkv P"], page: int, n: int) -> Float32[Tensor, "B Hkv n"]:
    """Return a score for each of the first `n` tokens that ranks them by their page's score, then by position.

    A top-k of these takes whole pages, and of the last one as many tokens as fit.

    Args:
        n: at most 2^24, up to which float32 is exact on integers.

    Cost: one sort over the pages, one pass over the tokens.
    """
    order = torch.argsort(pooled, dim=-1, descending=True, stable=True)
    places = torch.arange(pooled.shape[-1], device=pooled.device, dtype=torch.float32)
    rank = torch.empty_like(pooled).scatter_(-1, order, places.expand_as(pooled))
    within = torch.arange(page, device=pooled.device, dtype=torch.float32)
    return -(rank[..., None] * page + within).flatten(-2)[..., :n]
