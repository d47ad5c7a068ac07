"""Near bytes of a pass at its widest moments, and whether its dense reads come block by block."""

from __future__ import annotations

from typing import NamedTuple

from farkv.engine.bytes_need import ByteLimits, Need
from farkv.engine.pool_policy import USE_BYTES
from farkv.store.sizes import NearNeed
from farkv.store.tiers import BLOCK_TOKENS

# The smallest block of a dense read.
LEAST_BLOCK = 64


class Near(NamedTuple):
    """Near bytes by purpose; and, where a dense read cannot have a whole layer near, the tokens of its blocks."""

    need: NearNeed
    streams: bool
    block_tokens: int


def plan_near(need: Need, limits: ByteLimits, n_rows: int, most: int = BLOCK_TOKENS) -> Near:
    """Return the near bytes at the widest moments of a pass and of the steps after it.

    A dense read has the whole layer near where that fits, else two blocks of it in turn.

    Args:
        n_rows: rows at the widest.
        most: tokens of a block, at most.
    """
    if not limits.is_far:
        return Near(count_in_place(need, n_rows), False, BLOCK_TOKENS)
    # A coded record and its decoded copy exist side by side.
    coded = need.stored_bytes * need.shape.batch * need.shape.kv_heads if need.is_coded else 0
    token_bytes = need.shape.token_bytes + coded
    # What was put together only to be read is repeated for every query head besides; in place that is the model's own.
    assembled = need.expands or limits.page is not None or need.is_coded
    repeated = need.n_groups if need.n_groups > 1 and assembled else 0
    dense = n_rows * (token_bytes + repeated * need.shape.token_bytes)
    whole = count_near(need, n_rows, need.n_new, dense)
    if not must_stream(need, limits, whole):
        return Near(whole, False, BLOCK_TOKENS)
    n_at_once = need.n_at_once
    # Where host memory is near memory too, blocks are no larger than the passes.
    block = min(most, max(LEAST_BLOCK, n_at_once)) if limits.near_shares_host else most
    own = n_at_once * need.shape.token_bytes if need.n_new > 1 else 0
    if limits.near is not None:
        room = limits.near - count_near(need, n_rows, 0, 0).total - own
        # If the pass size can still be chosen, blocks are as large as passes: both cost time when small.
        least = max(LEAST_BLOCK, min(block, n_at_once // 2)) if n_at_once < need.n_new else LEAST_BLOCK
        block = max(least, min(block, room // (2 * token_bytes)))
    streamed = count_near(need, n_rows, need.n_new, 2 * min(block, n_rows) * token_bytes)
    return Near(streamed._replace(prefill=streamed.prefill + own), True, block)


def must_stream(need: Need, limits: ByteLimits, whole: NearNeed) -> bool:
    """Say whether dense reads come block by block: records are coded or paged, or a layer is too much."""
    if need.remembers:
        return False
    # Where every step reads everything, whole layers make it the plain model's; else they would take page copies' room.
    if not need.assembles and (limits.page is not None or need.is_coded):
        return True
    return limits.near is not None and whole.total > limits.near


def count_in_place(need: Need, n_rows: int) -> NearNeed:
    """Return the bytes beside records that are read where they lie: the index, uses, and a choice gathered to be read.

    A kernel reads a choice in place; the model's own attention, of padded or verified steps for example, cannot.
    """
    # What latents expand to is the model's own there, and less than without a choice.
    far = count_near(need._replace(expands=False), n_rows, 0, 0)
    # One copy, not two buffers; nothing is pinned.
    return NearNeed(far.index, 0, 0, far.decode // 2, far.held - need.pinned_bytes(n_rows))


def count_near(need: Need, n_rows: int, n_new: int, dense: int) -> NearNeed:
    """Return the near bytes where a dense read of one layer takes `dense`."""
    heads, n_layers = need.shape.batch * need.shape.kv_heads, len(need.layers)
    stored = need.stored_bytes * heads
    # A share of all tokens, as long as there are so many rows.
    n_read = min(n_rows, need.read_rows(max(n_rows, need.tokens)))
    n_sparse = n_layers - len(need.dense_layers)
    read = 2 * stored + (need.shape.token_bytes if need.is_coded else 0)
    if need.expands:
        read += need.n_groups * need.shape.token_bytes
    # An index is allocated for what was announced, though a pool may hold fewer rows of it.
    index = need.index_bytes(n_rows if need.pool is None else max(n_rows, need.reserve_tokens))
    uses = 0 if need.pool is None else n_layers * n_rows * heads * USE_BYTES
    return NearNeed(
        # While an index grows, its old and new rows exist side by side, one layer at a time.
        index=index * n_sparse + (0 if need.reserve_tokens >= n_rows else index),
        window=n_layers * 2 * (need.window + 1) * stored,
        prefill=dense if n_new > 1 else 0,
        # Two buffers; and what one is decoded, or expanded, to.
        decode=(n_read * read if n_sparse else 0) + (dense if need.verifies or n_sparse < n_layers else 0),
        held=uses + need.pinned_bytes(n_rows),
    )
