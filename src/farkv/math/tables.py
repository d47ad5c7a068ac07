"""Nibble tables: what each of the 16 values of a nibble stands for, learned from a prompt's own keys.

The columns of a projected key are cut into groups of `width`. Nibble i belongs to group i % groups and codes, by the
nearest of its 16 entries, what the earlier nibbles of its group left of the key: a residual quantiser per group. Codes
of even steps, and several columns in one nibble, are tables too, so that one scan serves every index.

In: projected keys. Out: tables, codes, and keys as codes tell them. Stateless.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Float32, Int8, Tensor

ENTRIES = 16
ROUNDS = 3
# Keys that are coded at a time.
BLOCK_KEYS = 1024
# Of the largest number of a head's keys, what is rounding.
ROUNDING = 2.0**-16
# Of every key's weight what does not depend on how much it is attended to, where the mean of all keys is 1.
LEAST_WEIGHT = 0.1


def weigh_keys(
    queries: Float[Tensor, "B Hkv M D"], keys: Float[Tensor, "B Hkv N D"], valid: Bool[Tensor, "B N"] | None
) -> Float32[Tensor, "B Hkv N"]:
    """Return how much an error in each key's code should count, by the attention that it gets.

        sqrt(N mean_m softmax_n(q_m . k_n) + 0.1)

    Without it the few keys that most queries read are coded no better than the rest.

    Args:
        queries: a sample of the prompt's, times the softmax scaling; a KV head's group side by side.
        valid: False on padding, which weighs nothing.

    Cost: 2 M N D operations per KV head.
    """
    scores = queries.float() @ keys.float().mT
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    mass = scores.softmax(-1).nan_to_num(nan=0.0).mean(2)
    n = keys.shape[2] if valid is None else valid.sum(-1)[:, None, None].clamp_min(1)
    weight = (mass * n + LEAST_WEIGHT).sqrt()
    return weight if valid is None else weight * valid[:, None]


def learn_tables(
    keys: Float32[Tensor, "B Hkv N R"], weights: Float32[Tensor, "B Hkv N"], n_nibbles: int, width: int
) -> Float32[Tensor, "B Hkv Y W"]:
    """Return tables that leave little of the weighted keys: k-means, nibble after nibble of every group.

    From a group's second nibble on, a key's weight is times the square of what is left of it: what hurts is a rare
    key that is told far too small, not the mean error.

    Args:
        keys: R a multiple of `width`; n_nibbles a multiple of the groups, R / width.

    Returns:
        Row 16 i + v is what value v of nibble i stands for, Y = 16 n_nibbles.

    Cost: 16 * 2 * ROUNDS * n_nibbles * width operations per key.
    """
    batch, heads, _, columns = keys.shape
    groups = columns // width
    rest = _cut(keys.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), width)
    weights = weights[:, :, None].expand(-1, -1, groups, -1)
    tiny = keys.abs().nan_to_num(posinf=0.0).flatten(2).amax(-1)[:, :, None, None, None] * ROUNDING
    tables: list[Tensor] = []
    for stage in range(n_nibbles // groups):
        share = weights * _weigh_rest(rest) if stage else weights
        table = rest.gather(-2, _pick_first(share)[..., None].expand(-1, -1, -1, -1, width))
        for _ in range(ROUNDS):
            near = _one_hot(_find_nearest(rest, table)) * share[..., None]
            mass = near.sum(-2)[..., None]
            table = torch.where(mass > 0, near.mT @ rest / mass.clamp_min(1e-30), table)
        rest = rest - _one_hot(_find_nearest(rest, table)) @ table
        # What is left by rounding alone is not worth an entry, and would make of rounding another table.
        rest = torch.where(rest.abs() < tiny, 0.0, rest)
        tables.append(table)
    return torch.stack(tables, 2).reshape(batch, heads, -1, width)


def _weigh_rest(rest: Tensor) -> Tensor:
    """Return the square of what is left of each key over its mean; 1 where nothing is left of any."""
    square = rest.square().sum(-1)
    mean = square.mean(-1, keepdim=True)
    return torch.where(mean > 0, square / mean.clamp_min(1e-30), 1.0)


def encode_nibbles(
    keys: Float32[Tensor, "B Hkv T R"], tables: Float32[Tensor, "B Hkv Y W"]
) -> Int8[Tensor, "B Hkv T W2"]:
    """Return the codes of projected keys: byte j holds nibble j in its low half, j + n/2 in its high half.

    Cost: 16 * 2 * n_nibbles * width operations per key.
    """
    return torch.cat([_encode(block, tables) for block in keys.split(BLOCK_KEYS, 2)], 2)


def _encode(keys: Tensor, tables: Tensor) -> Tensor:
    batch, heads = keys.shape[:2]
    width = tables.shape[-1]
    rest = _cut(keys, width)
    stages = tables.reshape(batch, heads, -1, rest.shape[2], ENTRIES, width)
    found: list[Tensor] = []
    for table in stages.unbind(2):
        nearest = _find_nearest(rest, table)
        rest = rest - _one_hot(nearest) @ table
        found.append(nearest)
    nibbles = torch.cat(found, 2).transpose(2, 3)
    low, high = nibbles.chunk(2, -1)
    return (low | high << 4).to(torch.uint8).view(torch.int8)


def split_nibbles(codes: Int8[Tensor, "B Hkv S W"]) -> Tensor:
    """Return the nibbles of codes, 0 .. 15, int64 [B, Hkv, S, 2 W]."""
    whole = codes.view(torch.uint8)
    return torch.cat([whole & 15, whole >> 4], -1).long()


def decode_nibbles(
    codes: Int8[Tensor, "B Hkv S W"], tables: Float32[Tensor, "B Hkv Y w"], n_columns: int
) -> Float32[Tensor, "B Hkv S R"]:
    """Return projected keys as their codes tell them: the sum of the entries of a group's nibbles."""
    batch, heads, n, _ = codes.shape
    n_rows, width = tables.shape[2:]
    groups = n_columns // width
    # All heads' tables are one: a row is a head's, a nibble's, an entry's.
    first = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1, 1) * n_rows
    rows = split_nibbles(codes) + torch.arange(0, n_rows, ENTRIES, device=codes.device) + first
    rows = rows.unflatten(-1, (-1, groups)).transpose(-1, -2)
    found = torch.nn.functional.embedding_bag(rows.flatten(0, 3), tables.reshape(-1, width), mode="sum")
    return found.view(batch, heads, n, n_columns)


def _cut(keys: Tensor, width: int) -> Tensor:
    """Return the columns of every group apart, [B, Hkv, groups, N, width]."""
    return keys.unflatten(-1, (-1, width)).transpose(2, 3)


def _pick_first(weights: Tensor) -> Tensor:
    """Return keys at even steps of the summed weight: heavy ones are likely to be among them."""
    sums = weights.double().cumsum(-1)
    steps = (torch.arange(ENTRIES, device=weights.device, dtype=torch.float64) + 0.5) / ENTRIES
    return torch.searchsorted(sums.contiguous(), (sums[..., -1:] * steps).contiguous(), right=True).clamp_max(
        weights.shape[-1] - 1
    )


def _find_nearest(rest: Tensor, table: Tensor) -> Tensor:
    near = rest @ table.mT - table.square().sum(-1)[..., None, :] / 2
    return near.nan_to_num(nan=-torch.inf).argmax(-1)


def _one_hot(nearest: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(nearest, ENTRIES).float()


def step_tables(scale: Float32[Tensor, "B Hkv 1 R"], bits: int) -> Float32[Tensor, "B Hkv Y 1"]:
    """Return the tables of codes in even steps: -8 .. 7 in one nibble; in two, the first counts 16 times as much.

    Args:
        scale: the step of every column.
        bits: 4 or 8.
    """
    value = torch.arange(-8, 8, device=scale.device, dtype=torch.float32)
    parts = [value] if bits == 4 else [value * ENTRIES, value]
    return torch.cat([(scale[..., 0, :, None] * part).flatten(2) for part in parts], 2)[..., None]


def level_tables(scale: Float32[Tensor, "B Hkv 1 R"]) -> Float32[Tensor, "B Hkv Y 2"]:
    """Return the tables of nibbles that hold two columns of two bits, of the levels -3/2, -1/2, 1/2, 3/2 of a step."""
    value = torch.arange(ENTRIES, device=scale.device)
    levels = torch.stack([value & 3, value >> 2], -1) - 1.5
    return (scale[..., 0, :].unflatten(-1, (-1, 1, 2)) * levels).flatten(2, 3)
