"""Attention over records that arrive block by block, exact to rounding: an online softmax.

In: queries, then keys and values in any number of blocks. Out: the output of attention over all of them at once.
Blocks may come in any order; only the new tokens' own block can be causal.

Source: FlashAttention §3.1 within a block; the same between blocks, with a block's log-sum-exp as the score and its
output as the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Float, Tensor
from farkv.math.logits import Logits

# Bytes of scores, or of mask values, at a time: a few megabytes stay in the CPU's cache.
TILE_BYTES = 8 * 2**20
# torch's fused CPU kernel, which also returns the log-sum-exp. The signature is older than torch 2.8 but not public:
# where a release lacks it, the plain path is used, as on a GPU, whose fused kernels have other rules for masks and
# alignment.
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class Part(NamedTuple):
    """Attention over some records; for a query that saw none, `out` is 0 and the log-sum-exp -inf."""

    out: Float[Tensor, "B Hkv r Dv"]
    lse: Float[Tensor, "B Hkv r"]


class Stream:
    """Attention of T queries over records that come in blocks: out = sum_blocks exp(lse_block - lse) out_block.

    Cost: 4 B Hq T (Dv + 2) bytes of float32 sums for any number of blocks. While a block of n records is added: one
    copy of the queries, two of the output; with a mask, or without the fused kernel, a few tiles of 8 MiB; without the
    fused kernel also the block in float32, 4 B Hkv n (D + Dv) bytes.
    """

    def __init__(self, q: Float[Tensor, "B Hq T D"], logits: Logits):
        self.q, self.logits = q, logits
        # Sums are at least float32; float64 stays.
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        # The largest lse so far (top), sum_blocks exp(lse - top), sum_blocks exp(lse - top) out; None before any block.
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        k: Float[Tensor, "B Hkv n D"],
        v: Float[Tensor, "B Hkv n Dv"],
        visible: Bool[Tensor, "b h t n"] | None,
        *,
        causal: bool = False,
    ) -> None:
        """Attend to one more block of records.

        Args:
            k, v: any strides; read in place where the last one is 1.
            visible: True where a query may see a record, [B or 1, Hq or 1, T or 1, n]; None: all see all.
            causal: the block is the T new tokens themselves, and a query sees none that is newer than itself.

        Cost: 2 B Hq T n (D + Dv) operations.
        """
        n_new, n = self.q.shape[2], k.shape[2]
        assert not causal or n == n_new
        q = self.q.unflatten(1, (k.shape[1], -1))
        if self.sums is None:
            self._start(q, v.shape[-1])
        if n == 0:
            return
        seen = group_mask(visible, q)
        fused = may_fuse(q, k, v, self.logits)
        if not fused:
            # Deliberate copies: the plain path computes in float32 or float64.
            k, v = k.to(self.dtype), v.to(self.dtype)
        attend = attend_fused if fused else attend_plain
        n_rows = count_rows(q, n, seen, fused=fused, causal=causal)
        for start in range(0, n_new, n_rows):
            rows = slice(start, min(start + n_rows, n_new))
            end = rows.stop if causal else n
            mask = cut_mask(seen, rows, end, causal=causal, device=k.device)
            # A group's queries are stacked (a copy of them), so that keys and values need not be repeated.
            now = q[:, :, :, rows]
            mask = fold_mask(mask, now)
            self._merge(attend(now.flatten(2, 3), k[:, :, :end], v[:, :, :end], mask, self.logits), rows)

    def take_part(self, rows: slice, n_kv: int, v_dim: int) -> Stream:
        """Return the stream of some of the queries: what is added to it is added here, by masks of few queries.

        Args:
            n_kv, v_dim: KV heads, and the dimension of the values that will come.
        """
        if self.sums is None:
            self._start(self.q.unflatten(1, (n_kv, -1)), v_dim)
        assert self.sums is not None
        top, weight, total = self.sums
        part = Stream(self.q[:, :, rows], self.logits)
        part.sums = top[..., rows], weight[..., rows], total[..., rows, :]
        return part

    def finish(self) -> Float[Tensor, "B Hq T Dv"]:
        """Return the attention output in the queries' dtype, 0 for a query that saw nothing, and end the stream.

        It is laid out in memory as [B, T, Hq, Dv], the order that models use next.
        """
        assert self.sums is not None
        top, weight, total = self.sums
        if self.logits.sinks is not None:
            # A sink acts like a record whose value is zero.
            lse = self.logits.sinks.to(self.dtype).unflatten(0, top.shape[1:3])[None, ..., None].expand_as(top)
            self._merge(Part(torch.zeros_like(total).flatten(2, 3), lse.flatten(2, 3)), slice(None))
        # The block with the largest lse has weight exp(0): a weight below 1 is 0, of a query that saw nothing.
        return total.div_(weight.clamp_min(1)[..., None]).to(self.q.dtype).flatten(1, 2)

    def _start(self, q: Float[Tensor, "B Hkv G T D"], v_dim: int) -> None:
        weight = torch.zeros(q.shape[:4], dtype=self.dtype, device=q.device)
        batch, n_kv, n_group, n_new = q.shape[:4]
        total = torch.zeros(batch, n_new, n_kv, n_group, v_dim, dtype=self.dtype, device=q.device)
        self.sums = torch.full_like(weight, -torch.inf), weight, total.permute(0, 2, 3, 1, 4)

    def _merge(self, part: Part, rows: slice) -> None:
        """Add a block's attention for some of the queries."""
        assert self.sums is not None
        top, weight, total = (t[:, :, :, rows] for t in self.sums)
        lse = part.lse.to(self.dtype).unflatten(2, top.shape[2:])
        new = torch.maximum(top, lse)
        # -inf minus -inf would be NaN where nothing was seen yet.
        base = new.masked_fill(new == -torch.inf, 0)
        kept, added = (top - base).exp_(), (lse - base).exp_()
        out = part.out.to(self.dtype).unflatten(2, top.shape[2:])
        total.mul_(kept[..., None]).addcmul_(out, added[..., None])
        weight.mul_(kept).add_(added)
        top.copy_(new)


def may_fuse(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> bool:
    """Return whether the fused kernel supports this case; it reads wrong values where the last stride is not 1."""
    return (
        _fused is not None
        and q.device.type == "cpu"
        and logits.softcap is None
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    )


def attend_fused(
    q: Float[Tensor, "B Hkv r D"],
    k: Float[Tensor, "B Hkv n D"],
    v: Float[Tensor, "B Hkv n D"],
    mask: Bool[Tensor, "b h #r n"] | None,
    logits: Logits,
) -> Part:
    """Attend with torch's fused kernel. Cost: the mask in the dtype of the queries."""
    assert _fused is not None
    if mask is None:
        return Part(*_fused(q, k, v, scale=logits.scaling))
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    out, lse = _fused(q, k, v, attn_mask=bias.expand(-1, -1, q.shape[2], -1), scale=logits.scaling)
    # For a query that sees nothing, the kernel returns a log-sum-exp of 0 instead of -inf.
    empty = ~mask.any(-1)
    return Part(out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf))


def attend_plain(
    q: Float[Tensor, "B Hkv r D"],
    k: Float[Tensor, "B Hkv n D"],
    v: Float[Tensor, "B Hkv n Dv"],
    mask: Bool[Tensor, "b h #r n"] | None,
    logits: Logits,
) -> Part:
    """Attend in plain operations, in the dtype of the keys. Cost: the scores, B Hkv r n."""
    scores = (q.to(k.dtype) * logits.scaling) @ k.mT
    logits.cap_(scores)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    # The largest weight is 1 where anything is seen: a total below 1 is 0.
    return Part((weights @ v).div_(total.clamp_min(1)), (top + total.log()).squeeze(-1))


def group_mask(visible: Tensor | None, q: Float[Tensor, "B Hkv G T D"]) -> Bool[Tensor, "b h g t n"] | None:
    """Return the mask with an axis for the group; None where all is visible and that is cheap to find out."""
    # On a CPU, checking the flags costs 1 % of the attention, a mask 10 %. For a single token it does not pay.
    if visible is None or (q.shape[3] > 1 and visible.device.type == "cpu" and bool(visible.all())):
        return None
    return visible[:, :, None] if visible.shape[1] == 1 else visible.unflatten(1, q.shape[1:3])


def count_rows(q: Tensor, n: int, seen: Tensor | None, *, fused: bool, causal: bool) -> int:
    """Return how many of the T queries fill a tile of scores, or of mask values for the fused kernel."""
    batch, n_kv, n_group, n_new = q.shape[:4]
    if fused and not causal:
        if seen is None or seen.shape[2] == seen.shape[3] == 1:
            return n_new
        batch, n_kv = seen.shape[:2]
    return max(1, TILE_BYTES // (4 * batch * n_kv * n_group * n))


def cut_mask(
    seen: Tensor | None, rows: slice, end: int, *, causal: bool, device: torch.device
) -> Bool[Tensor, "b h g t n"] | None:
    """Return which of the first `end` records these queries may see, the causal order included."""
    if seen is not None:
        seen = seen[..., rows if seen.shape[3] > 1 else slice(None), :end]
    if not causal:
        return seen
    order = torch.arange(end, device=device) <= torch.arange(rows.start, rows.stop, device=device)[:, None]
    return order[None, None, None] if seen is None else seen & order


def fold_mask(mask: Tensor | None, q: Float[Tensor, "B Hkv G t D"]) -> Bool[Tensor, "b h r n"] | None:
    """Return the mask for a group's stacked queries; a single row where all of them see the same."""
    if mask is None or mask.shape[2] == mask.shape[3] == 1:
        return None if mask is None else mask[:, :, 0]
    return mask.expand(-1, -1, *q.shape[2:4], -1).flatten(2, 3)
