"""Attention weights in plain tensor operations, and masks over chosen records.

In: queries, keys, what is visible. Out: weights, or the attention mass that a choice holds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from farkv._axes import Bool, Float, Float32, Int, Tensor
from farkv.math.logits import Logits


def weigh_keys(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B Hkv S D"],
    visible: Bool[Tensor, "B T S"] | None,
    logits: Logits,
) -> Float32[Tensor, "B Hkv G T S"]:
    """Return softmax(scaling * q k^T) of every query head, grouped by KV head, in float32.

    Cost: 2 Hq T S D operations; Hq T S floats.
    """
    batch, kv_heads, _, dim = k.shape
    grouped = q.float().reshape(batch, kv_heads, -1, q.shape[2], dim)
    scores = logits.cap(grouped @ k.float()[:, :, None].mT * logits.scaling)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return scores.softmax(-1)


def weigh_rows(
    q: Float[Tensor, "B Hq T D"],
    keys: Iterable[Float[Tensor, "B Hkv n D"]],
    visible: Bool[Tensor, "b h t K"] | None,
    logits: Logits,
) -> Float32[Tensor, "B Hkv T K"]:
    """Return the softmax weights of some records, which may differ by head; mean over the query group.

    Args:
        keys: in blocks, K in all; one block at a time is converted to float32.

    Cost: 2 Hq T K D operations; Hq T K floats.
    """
    parts: list[Tensor] = []
    for k in keys:
        grouped = q.float().reshape(k.shape[0], k.shape[1], -1, q.shape[2], k.shape[-1])
        parts.append(grouped @ k.float()[:, :, None].mT * logits.scaling)
    scores = logits.cap(torch.cat(parts, -1))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    # A padded query sees nothing: its softmax is NaN, its weights are 0.
    return scores.softmax(-1).nan_to_num(0.0).mean(2)


def measure_mass(
    weights: Float32[Tensor, "B Hkv G 1 S"],
    positions: Int[Tensor, "B Hkv K"],
    valid: Bool[Tensor, "B Hkv K"] | None,
) -> Float32[Tensor, "B Hkv"]:
    """Return the fraction of the true attention weight on the chosen records, mean over the query group."""
    mean = weights[:, :, :, 0].mean(2)
    found = mean.gather(-1, positions)
    if valid is not None:
        found = found * valid
    return found.sum(-1)


def align_mask(
    mask: Bool[Tensor, "b 1 1 S"] | None,
    positions: Int[Tensor, "B Hkv K"],
    valid: Bool[Tensor, "B Hkv K"] | None,
    n_groups: int,
) -> Bool[Tensor, "B Hq 1 K"] | None:
    """Turn the mask over the context into one over the chosen records; None where all of them are visible."""
    if mask is None and valid is None:
        return None
    batch, heads, n = positions.shape
    if mask is None:
        seen = torch.ones_like(positions, dtype=torch.bool)
    else:
        seen = mask[:, 0].expand(batch, heads, -1).gather(-1, positions)
    if valid is not None:
        seen = seen & valid
    return seen[:, :, None, None].expand(batch, heads, n_groups, 1, n).reshape(batch, heads * n_groups, 1, n)


def add_odds(
    mask: Bool[Tensor, "B Hq 1 K"] | None, odds: Float32[Tensor, "B Hkv N"], n_rows: int, n_groups: int
) -> Float32[Tensor, "B Hq 1 K"]:
    """Return what to add to the logits of `n_rows` records: the odds of the first ones; -inf where the mask hides."""
    more = torch.nn.functional.pad(odds, (0, n_rows - odds.shape[-1]))
    bias = more.repeat_interleave(n_groups, 1)[:, :, None]
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def align_rows(
    mask: Bool[Tensor, "b 1 T S"], places: Int[Tensor, "B Hkv K"], n_groups: int
) -> Bool[Tensor, "B Hq T K"]:
    """Turn the mask over the context into one over the rows that an evicted layer still stores.

    Args:
        places: the token of each row.

    Cost: B Hq T K flags.
    """
    batch, heads, n = places.shape
    n_new = mask.shape[2]
    seen = mask.expand(batch, heads, -1, -1).gather(-1, places[:, :, None].expand(-1, -1, n_new, -1))
    return seen[:, :, None].expand(-1, -1, n_groups, -1, -1).reshape(batch, heads * n_groups, n_new, n)
