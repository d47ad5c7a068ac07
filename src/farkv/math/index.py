"""Build the index of one layer: project keys; the steps of columns that are rounded evenly.

In: keys, the skew's leading columns. Out: projected keys, means, steps. `math.tables` makes codes of them. Stateless.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Float32, Tensor

# Keys that are projected at a time.
BLOCK_TOKENS = 1024
# Two nibbles of -8 .. 7, the first worth 16 times the second.
CODE_MAX = {8: 7 * 16 + 7, 4: 7}
# Headroom before a code clips: later keys may be slightly larger than the prompt's. Four bits have none to spare.
HEADROOM = {8: 1.1, 4: 1.0}
# Step, in standard deviations, of the four-level uniform quantiser of least distortion for a normal variable (Max
# 1960, table I).
LEVEL_STEP = 0.9957


def project_keys(
    k: Float[Tensor, "B Hkv T D"], key: Float32[Tensor, "b Hkv D R"], mean: Float32[Tensor, "b Hkv 1 D"]
) -> Float32[Tensor, "B Hkv T R"]:
    """Return (k - mean) A_k in float32. Cost: 2 Hkv T D R operations; at a time, 1024 keys in float32."""
    if k.shape[2] <= BLOCK_TOKENS:
        return (k.float() - mean) @ key
    return torch.cat([(block.float() - mean) @ key for block in k.split(BLOCK_TOKENS, 2)], 2)


def fit_scale(
    projected: Float32[Tensor, "B Hkv T R"], valid: Bool[Tensor, "B T"] | None, bits: int = 8
) -> Float32[Tensor, "B Hkv 1 R"]:
    """Return the step of each column's codes: its largest magnitude, with headroom, over the largest code."""
    # What is not finite says nothing about the others.
    magnitude = projected.abs().nan_to_num(nan=0.0, posinf=0.0)
    if valid is not None:
        magnitude = magnitude * valid[:, None, :, None]
    return magnitude.amax(2, keepdim=True).clamp_min(1e-12) * (HEADROOM[bits] / CODE_MAX[bits])


def measure_mean(k: Float[Tensor, "B Hkv T D"], valid: Bool[Tensor, "B T"] | None) -> Float32[Tensor, "B Hkv 1 D"]:
    """Return every sequence's mean key; what is not finite counts as 0."""
    k = k.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if valid is None:
        return _bound(k.mean(2, keepdim=True))
    real = valid[:, None, :, None]
    return _bound((k * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1))


def _bound(mean: Tensor) -> Tensor:
    """Return a mean that overflowed as the largest number."""
    return mean.nan_to_num(nan=0.0)


def fit_levels(
    projected: Float32[Tensor, "B Hkv T R"], valid: Bool[Tensor, "B T"] | None, bits: int = 2
) -> Float32[Tensor, "B Hkv 1 R"]:
    """Return the step of each column's four levels: its root mean square times 0.9957.

    Source: J. Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6 (1960).
    """
    mean = measure_mean(projected.square(), valid)
    return mean.sqrt().clamp_min(1e-12) * LEVEL_STEP


def choose_columns(
    q: Float[Tensor, "B Hkv Tq D"], k: Float[Tensor, "B Hkv T D"], skew: Float32[Tensor, "b Hkv D D"], n_columns: int
) -> Float32[Tensor, "B Hkv D R"]:
    """Return the skew's columns with the largest summed magnitude of skewed queries and keys.

    The paper's partial weight index generation: top-R of sum_t |Q~| + sum_t |K~|, per prompt and head.

    Args:
        q: the prompt's queries, each KV head's group stacked along the token axis.
        k: the prompt's keys.

    Source: InfiniGen §4.3; deviation: per sequence and KV head.
    """
    q, k = (x.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (q, k))
    weight = (q @ skew).abs().sum(2) + (k @ skew).abs().sum(2)
    columns = weight.topk(n_columns, -1).indices.sort(-1).values
    batch, heads = columns.shape[:2]
    wide = skew.expand(batch, heads, -1, -1)
    return wide.gather(-1, columns[:, :, None].expand(-1, -1, wide.shape[2], -1))
