"""Evenly spaced samples of a sequence's queries and keys, counted by real tokens: padding does not change them.

In: queries or keys, and which tokens are real. Out: a sample, and which of its entries are real. Stateless.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Int, Tensor


def order_real(real: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the columns of the real tokens in order, then those of padding."""
    return (~real).byte().argsort(dim=-1, stable=True)


def take_columns(rows: Float[Tensor, "B H T D"], columns: Int[Tensor, "b N"]) -> Float[Tensor, "B H N D"]:
    """Return the rows at columns that differ by sequence and are the same for all heads."""
    batch, heads, _, dim = rows.shape
    return rows.gather(2, columns[:, None, :, None].expand(batch, heads, -1, dim))


def thin_columns(
    n: int, real: Bool[Tensor, "B T"] | None, most: int, device: torch.device
) -> tuple[Int[Tensor, "b N"], Bool[Tensor, "b N"] | None]:
    """Return the columns of at most `most` of every sequence's `n` tokens, evenly spaced; False where it has fewer.

    They depend on the tokens alone, not on how a prompt was split into passes.
    """
    if real is None:
        return torch.arange(0, n, -(-n // most), device=device)[None], None
    lengths = real.sum(-1, keepdim=True)
    stride = ((lengths + most - 1) // most).clamp_min(1)
    at = torch.arange(min(n, most), device=real.device) * stride
    return order_real(real).gather(1, at.clamp_max(n - 1)), at < lengths


def thin_keys(
    k: Float[Tensor, "B Hkv T D"], real: Bool[Tensor, "B T"] | None, most: int
) -> tuple[Float[Tensor, "B Hkv N D"], Bool[Tensor, "B N"] | None]:
    """Return at most `most` keys of every sequence, evenly spaced, zeros where it has fewer than others.

    Cost: without padding none, a view.
    """
    n = k.shape[2]
    if real is None:
        return k[:, :, :: -(-n // most)], None
    columns, valid = thin_columns(n, real, most, k.device)
    assert valid is not None
    return take_columns(k, columns).masked_fill(~valid[:, None, :, None], 0), valid


def add_block(
    sample: Float[Tensor, "B Hkv N D"],
    columns: Int[Tensor, "b N"],
    start: int,
    block: Float[Tensor, "B Hkv T D"],
) -> None:
    """Fill in those tokens of the sample at `columns` that are in a block starting at token `start`, in place."""
    inside = (columns >= start) & (columns < start + block.shape[2])
    # A deliberate sync, once per block of a prompt.
    at = inside.any(0).nonzero()[:, 0]
    if len(at):
        rows = take_columns(block, (columns[:, at] - start).clamp(0, block.shape[2] - 1))
        sample[:, :, at] = torch.where(inside[:, at][:, None, :, None], rows, sample[:, :, at])


def widen_stride(stride: int, n_tokens: int, most: int) -> int:
    """Return the stride, doubled until it leaves at most `most` of `n_tokens`."""
    while -(-n_tokens // stride) > most:
        stride *= 2
    return stride


def extend_sample(old: Float[Tensor, "B Hq M D"], q: Float[Tensor, "B Hq 1 D"], most: int) -> Float[Tensor, "B Hq N D"]:
    """Return a sample with one more query, in the memory of `old` where that has room.

    Cost: one query written; without room, a copy into twice the memory, at most `most` queries.
    """
    batch, heads, n, dim = old.shape
    if old.stride(2) != dim or old.stride(1) < (n + 1) * dim:
        grown = old.new_empty(batch, heads, max(n + 1, min(most, 2 * n)), dim)
        grown[:, :, :n] = old
        old = grown[:, :, :n]
    longer = old.as_strided((batch, heads, n + 1, dim), old.stride(), old.storage_offset())
    longer[:, :, n] = q[:, :, 0]
    return longer


def thin_queries(
    old: Float[Tensor, "B Hq M D"] | None,
    q: Float[Tensor, "B Hq T D"],
    real: Bool[Tensor, "B T"] | None,
    tokens: Int[Tensor, "4 B"],
    n_slots: int,
) -> Float[Tensor, "B Hq N D"]:
    """Return a sample of every sequence's queries so far: its tokens 0, s, 2 s, ...; zeros after the last.

    Strides only double, so the sample does not depend on how the tokens were split into passes.

    Args:
        old: the sample before this pass.
        q: this pass's queries.
        tokens: per sequence, real tokens before and after this pass, stride before and after it.
        n_slots: the length of the longest sequence's sample.
    """
    seen, total, was, stride = tokens[..., None].unbind(0)
    at = torch.arange(n_slots, device=q.device) * stride
    n_new, n_old = q.shape[2], 0 if old is None else old.shape[2]
    new = (at - seen).clamp(0, n_new - 1)
    new = new if real is None else order_real(real).gather(1, new)
    valid = at < total
    if old is None:
        # There is no sample of the tokens before this pass.
        valid = valid & (at >= seen)
        both, columns = q, new
    else:
        both = torch.cat([old, q], 2)
        columns = torch.where(at < seen, (at // was).clamp_max(n_old - 1), n_old + new)
    return take_columns(both, columns).masked_fill_(~valid[:, None, :, None], 0)
