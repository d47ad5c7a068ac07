"""Build the index of one layer: project keys and round them to 8 or 4 bits.

In: keys, the skew's leading columns. Out: codes and the scale they were rounded with. Keeps nothing.
"""

from __future__ import annotations

from farkv._axes import Bool, Float, Float32, Int8, Tensor

CODE_MAX = {8: 127, 4: 7}
# Later keys may be a little larger than the prompt's: headroom before a code clips. Four bits have none to give.
HEADROOM = {8: 1.1, 4: 1.0}


def project_keys(
    k: Float[Tensor, "B Hkv T D"], key: Float32[Tensor, "b Hkv D R"], mean: Float32[Tensor, "b Hkv 1 D"]
) -> Float32[Tensor, "B Hkv T R"]:
    """Return (k - mean) A_k in float32. Cost: 2 Hkv T D R operations."""
    return (k.float() - mean) @ key


def fit_scale(
    projected: Float32[Tensor, "B Hkv T R"], valid: Bool[Tensor, "B T"] | None, bits: int = 8
) -> Float32[Tensor, "B Hkv 1 R"]:
    """Return the step of each column's codes: its largest magnitude, with headroom, over the largest code."""
    magnitude = projected.abs()
    if valid is not None:
        magnitude = magnitude * valid[:, None, :, None]
    return magnitude.amax(2, keepdim=True).clamp_min(1e-12) * (HEADROOM[bits] / CODE_MAX[bits])


def encode_keys(
    projected: Float32[Tensor, "B Hkv T R"], scale: Float32[Tensor, "B Hkv 1 R"], bits: int = 8
) -> Int8[Tensor, "B Hkv T R"]:
    """Round to codes: clip(round(projected / scale), -127, 127), or to 7 where there are four bits."""
    return (projected / scale).round_().clamp_(-CODE_MAX[bits], CODE_MAX[bits]).char()


def pack_codes(codes: Int8[Tensor, "B Hkv T R"]) -> Int8[Tensor, "B Hkv T R2"]:
    """Put two four-bit codes into a byte: the first R/2 columns into the low halves, the others into the high ones.

    Args:
        codes: R even, each in [-7, 7].
    """
    low, high = codes.chunk(2, -1)
    return (low & 0x0F) | (high << 4)


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
    weight = (q.float() @ skew).abs().sum(2) + (k.float() @ skew).abs().sum(2)
    columns = weight.topk(n_columns, -1).indices.sort(-1).values
    batch, heads = columns.shape[:2]
    wide = skew.expand(batch, heads, -1, -1)
    return wide.gather(-1, columns[:, :, None].expand(-1, -1, wide.shape[2], -1))
