"""Score the index with a query: an estimate of every stored record's attention logit.

In: a query (estimated or true), projected keys. Out: one score per record and KV head. No host sync, no loop over
heads.
"""

from __future__ import annotations

import math

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.math.logits import Logits


def project_query(
    q: Float[Tensor, "B Hq 1 D"], query: Float32[Tensor, "b Hkv D R"], logits: Logits
) -> Float32[Tensor, "B Hkv G R"]:
    """Return q A_q with the softmax scaling folded in. Cost: 2 Hq D R operations."""
    grouped = q.float().reshape(q.shape[0], query.shape[1], -1, q.shape[-1])
    return (grouped @ query) * logits.scaling


def score_index(
    projected: Float32[Tensor, "B Hkv G R"], keys: Float[Tensor, "B Hkv S R"], logits: Logits
) -> Float32[Tensor, "B Hkv G S"]:
    """Return estimated attention logits, up to a constant per query.

    Args:
        keys: projected keys, as their codes tell them.

    Cost: 2 Hq S R operations.
    """
    return logits.cap(projected @ keys.float().mT)


def pool_group(scores: Float32[Tensor, "B Hkv G S"], valid: Bool[Tensor, "B h S"] | None) -> Float32[Tensor, "B Hkv S"]:
    """Pool the queries of one KV head: log of the group's mean attention weight on a record.

    Choosing the largest of these keeps the most attention mass. Padding gets -inf.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None], -torch.inf)
    group = scores.shape[2]
    logs = scores.log_softmax(-1)
    pooled = logs[:, :, 0] if group == 1 else logs.logsumexp(2) - math.log(group)
    # A row of padding, or a query or key that is not finite, has a softmax of NaN, which a top-k would rank first.
    return pooled.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)


def pool_group_by_best(
    scores: Float32[Tensor, "B Hkv G S"], valid: Bool[Tensor, "B h S"] | None
) -> Float32[Tensor, "B Hkv S"]:
    """Pool the queries of one KV head: the maximum of their logits, each relative to its query's largest one.

    Source: InfiniGen §4.3, s > max(s) - alpha; with one query per KV head it is the paper's rule.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None], -torch.inf)
    best = scores.amax(-1, keepdim=True)
    return (scores - best).amax(2).nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)


def score_keys(
    q: Float[Tensor, "B Hq 1 D"], k: Float[Tensor, "B Hkv S D"], logits: Logits
) -> Float32[Tensor, "B Hkv G S"]:
    """Return the true logits of a query over full keys, for the oracle. Cost: every key is read."""
    batch, kv_heads = k.shape[:2]
    scores = q.float().reshape(batch, kv_heads, -1, q.shape[-1]) @ k.float().mT * logits.scaling
    return logits.cap(scores)
