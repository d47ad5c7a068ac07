"""Importance of each stored record, estimated from the layer's recent queries.

In: the last queries (or their moments), keys, values. Out: scores, the layer's gain curve, and the curve of a
selector that chooses anew at every step. Reads K and V in blocks; stateless.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import avg_pool1d

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.errors import CacheStateError, ConfigError
from farkv.math.logits import Logits

Scorer = Literal["window", "expected", "value"]
SCORERS: tuple[Scorer, ...] = ("window", "expected", "value")
# Keys weighed at a time, and the bytes of their weights: fewer keys where there are many queries.
BLOCK, BLOCK_BYTES = 4096, 8 << 20
# The moments use at most this many of the latest queries: the published method looks 512 positions ahead.
MOMENT_QUERIES = 512
# Queries whose weights over the whole context are sorted at a time, by `measure_spread`.
QUERIES_AT_ONCE = 4
PADDING = -1.0  # below every real record


class Observed(NamedTuple):
    """What a scorer needs of a layer's recent queries.

    `window` is the last w queries after RoPE, oldest first; the moments, which only "expected" needs, are those of the
    latest queries of the last text that was read in passes of more than one token; `latest` are those, while it is.
    """

    window: Float[Tensor, "B Hq w D"]
    mean: Float32[Tensor, "B Hq D"] | None
    covariance: Float32[Tensor, "B Hq D D"] | None
    latest: Float[Tensor, "B Hq n D"] | None = None


@torch.no_grad()
def observe_queries(
    q: Float[Tensor, "B Hq T D"],
    window: int,
    scorer: Scorer,
    old: Observed | None,
    *,
    valid: Bool[Tensor, "B S"] | None = None,
) -> Observed:
    """Move the window on to the last queries, and measure the moments where the scorer needs them.

    However a text is split into passes of more than one token, the result is the same, to rounding.

    Args:
        q: this pass's queries, after RoPE.
        window: queries to keep; fewer where there have been fewer so far.
        old: the result of the passes before.
        valid: False on padding, which the moments leave out; of the whole context, or as far as the moments reach.

    Raises:
        ConfigError: the window holds no query.

    Cost: a copy of the window; for "expected" 1024 Hq D^2 operations in a pass of more than one token, and a copy of
    up to 512 queries that is kept until the first pass of one.
    """
    if window < 1:
        raise ConfigError(f"the observation window was {window} queries; it must hold 1 or more: set it to 8")
    last = _slide(None if old is None else old.window, q, window)
    mean, covariance, latest = (None, None, None) if old is None else (old.mean, old.covariance, None)
    if scorer == "expected" and (mean is None or q.shape[2] > 1):
        latest = _slide(None if old is None else old.latest, q, MOMENT_QUERIES)
        mean, covariance = _measure_moments(latest.float(), valid)
    return Observed(last, mean, covariance, latest)


def _slide(old: Tensor | None, q: Tensor, most: int) -> Tensor:
    """Return the last `most` queries."""
    both = q[:, :, -most:] if old is None else torch.cat((old, q[:, :, -most:]), 2)[:, :, -most:]
    # A copy: a view would keep the whole prompt's queries in memory.
    return both.clone(memory_format=torch.contiguous_format)


def _measure_moments(latest: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean [B, Hq, D] and covariance [B, Hq, D, D], over n and not n - 1, of the latest valid queries."""
    if valid is None:
        mean = latest.mean(2, keepdim=True)
        centred, n = latest - mean, latest.shape[2]
    else:
        padded = ~valid[:, None, -latest.shape[2] :, None]
        n = (~padded).sum(2, keepdim=True).clamp_min(1)
        mean = latest.masked_fill(padded, 0.0).sum(2, keepdim=True) / n
        centred = (latest - mean).masked_fill_(padded, 0.0)
    return mean[:, :, 0], centred.mT @ centred / n


@torch.no_grad()
def score_records(
    scorer: Scorer,
    observed: Observed,
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S Dv"],
    visible: Bool[Tensor, "B h S"] | None,
    logits: Logits,
    *,
    pool: int = 7,
) -> Float32[Tensor, "B Hkv N"]:
    """Score every record but the newest w, which are the window itself and always stay.

        window    s_j = pool_j( sum_i softmax_j(softcap(scaling q_i . k_j)) )   over the window's queries i
        value     s_j |v_j| / mean |v|          over the head's visible records
        expected  softmax_j(scaling mu . k_j + scaling^2 / 2 k_j' Sigma k_j) |v_j| / mean |v|

    Each is the mean over the query group. A padded query adds nothing.

    Args:
        visible: False on padding; h is 1 or Hkv.
        pool: width of the average along tokens, zero-padded at the ends; padding counts as zero too.

    Returns:
        float32 [B, Hkv, N], N = max(S - w, 0): 0 or more, and exactly -1 on padding, so that a top-k takes every real
        record first.

    Raises:
        ConfigError: `pool` is not odd. CacheStateError: "expected", and no moments were observed.

    Cost: "window" and "value" 4 Hq w S D operations, 8 MiB of weights, B BLOCK Hkv D floats and the result (twice while
    it is pooled); "expected" 2 Hq S D^2 operations and B Hq S floats.
    Source: "window" XKV's released code (SnapKV); deviation: the mean over the query group, because KV is kept per KV
    head. "value" CriticalKV, LAVa; deviation: the norm of v, not of W_O v, because a cache knows no output projection.
    "expected" Expected Attention; deviations: the moments are of the last 512 queries after RoPE, in place of
    statistics before RoPE turned ahead by 512 positions; a softcap, which leaves no closed logits, is left out.
    """
    if pool < 1 or pool % 2 == 0:
        raise ConfigError(f"the pooling width was {pool}; it must be odd to be centred on a record: set it to 7")
    n = max(k.shape[2] - observed.window.shape[2], 0)
    if n == 0:
        return k.new_zeros(*k.shape[:2], 0, dtype=torch.float32)
    if scorer == "expected":
        scores = _expect(observed, k[:, :, :n], visible, logits)
    else:
        scores = _sum_window(observed, k, visible, logits)
        scores = avg_pool1d(scores.flatten(0, 1), pool, stride=1, padding=pool // 2).view_as(scores)
    if scorer != "window":
        scores.mul_(_measure_values(v, visible)[..., :n])
    if visible is not None:
        scores.masked_fill_(~visible[..., :n], PADDING)
    return scores


def sort_gains(scores: Float32[Tensor, "B H N"]) -> Float32[Tensor, "B N"]:
    """Return the layer's gain curve: what the r-th best record of every head adds, as a fraction of the total.

        g(r) = sum_h s[h, (r)] / sum_h sum_j s[h, j]

    Returns:
        float32 [B, N], non-increasing, sum 1; zeros where all scores are 0 or less (padding counts as 0).

    Cost: one sort of N per head; 16 bytes a score.
    Source: XKV's importance distribution; its released code sorts every query head.
    """
    ranked = scores.clamp_min(0).sort(-1, descending=True).values
    return _normalise(ranked.sum(1, dtype=torch.float64))


@torch.no_grad()
def measure_spread(
    observed: Observed, k: Float[Tensor, "B Hkv S D"], visible: Bool[Tensor, "B h S"] | None, logits: Logits
) -> Float32[Tensor, "B S"]:
    """Return the gain curve of a selector that chooses anew at every step.

    For each query of the window, the weights (mean over the group) on the keys that it sees are sorted; the curve is
    the mean over queries and KV heads. Its first c entries sum to the mass of the best c records *of each step*, where
    `sort_gains` gives the mass of one set for all steps.

    Returns:
        float32 [B, S], non-increasing, sum 1; zeros for a sequence without real queries.

    Cost: 4 Hq w S D operations, K read w / 2 times, one sort of S per query and KV head; some 112 B Hkv S bytes.
    """
    n_tokens = k.shape[2]
    window = observed.window[:, :, max(observed.window.shape[2] - n_tokens, 0) :]
    curve = k.new_zeros(k.shape[0], n_tokens, dtype=torch.float64)
    end = n_tokens - window.shape[2]
    for some in window.split(QUERIES_AT_ONCE, 2):
        end += some.shape[2]
        seen = None if visible is None else visible[..., :end]
        weights = k.new_empty(*k.shape[:2], some.shape[2], end, dtype=torch.float32)
        for at, block in walk_weights(some, k[:, :, :end], seen, logits, 2):
            weights[..., at] = block
        curve[:, :end] += weights.sort(-1, descending=True).values.sum((1, 2), dtype=torch.float64)
    return _normalise(curve)


def _normalise(curve: Tensor) -> Tensor:
    total = curve.sum(-1, keepdim=True)
    return torch.where(total > 0, curve / total, 0.0).float()


def _split(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def walk_weights(
    window: Tensor, k: Tensor, visible: Tensor | None, how: Logits, dim: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the softmax weights [B, Hkv, G, w, n] of the last w queries, summed over `dim`, by blocks of n keys.

    Two passes over the keys, the first for the log-sum-exp; one block in memory at a time.
    """
    n_tokens = k.shape[2]
    size = max(64, min(BLOCK, BLOCK_BYTES // max(1, 4 * window.shape[:3].numel())))
    # Scaling the few queries instead of the logits saves a pass over every block.
    q = (window.float() * how.scaling).unflatten(1, (k.shape[1], -1))
    padded = None if visible is None else ~visible[:, :, None, n_tokens - window.shape[2] :]
    if padded is not None:
        q.masked_fill_(padded[..., None], 0.0)  # a model may leave NaN there
    peak = q.new_full((), torch.finfo(torch.float32).min)
    total = torch.zeros_like(peak)
    for at in _split(n_tokens, size):
        logits = _form_logits(q, k, visible, how, at)
        higher = torch.maximum(peak, logits.amax(-1))
        total = total * (peak - higher).exp() + logits.sub_(higher[..., None]).exp_().sum(-1)
        peak = higher
        del logits  # before the next block is allocated
    log_sum = peak + total.log()
    log_sum.masked_fill_(total == 0, torch.inf)  # a query of NaN: nothing has weight
    if padded is not None:
        log_sum.masked_fill_(padded, torch.inf)  # makes all its weights 0; a real query sees at least itself
    for at in _split(n_tokens, size):
        yield at, _form_logits(q, k, visible, how, at).sub_(log_sum[..., None]).exp_().sum(dim)


def _form_logits(q: Tensor, k: Tensor, visible: Tensor | None, how: Logits, at: slice) -> Tensor:
    """Return the logits [B, Hkv, G, w, n] of the last w queries, scaled, on a block of keys; -inf where unseen."""
    n_tokens, w = k.shape[2], q.shape[3]
    logits = how.cap_((q.flatten(2, 3) @ k[:, :, at].float().mT).unflatten(2, q.shape[2:4]))
    # A logit that is not a number weighs nothing, one that overflowed all: others' weights stay numbers.
    logits.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    if visible is not None:
        logits.masked_fill_(~visible[:, :, None, None, at], -torch.inf)
    if at.stop > n_tokens - w:
        keys = torch.arange(at.start, at.stop, device=k.device)
        newest = torch.arange(n_tokens - w, n_tokens, device=k.device)
        logits.masked_fill_(keys > newest[:, None], -torch.inf)
    return logits


def _sum_window(observed: Observed, k: Tensor, visible: Tensor | None, logits: Logits) -> Tensor:
    """Return the window's summed weights [B, Hkv, N] on the records before it."""
    window = observed.window
    n = k.shape[2] - window.shape[2]
    scores = k.new_empty(*k.shape[:2], n, dtype=torch.float32)
    for at, weights in walk_weights(window, k, visible, logits, 3):
        # The last blocks reach into the window, whose columns are dropped.
        scores[..., at] = weights.mean(2)[..., : max(n - at.start, 0)]
    return scores


def _expect(observed: Observed, k: Tensor, visible: Tensor | None, logits: Logits) -> Tensor:
    """Return the expected weights [B, Hkv, N] of Gaussian queries."""
    mean, covariance = observed.mean, observed.covariance
    if mean is None or covariance is None:
        raise CacheStateError(
            'the scorer "expected" needs the moments of the queries, and none were observed: '
            'pass scorer="expected" to observe_queries too'
        )
    batch, kv_heads, n, dim = k.shape
    # One product for the whole group: its covariances stand side by side, [D, G D].
    sides = covariance.view(batch, kv_heads, -1, dim, dim).transpose(2, 3).flatten(3) * (logits.scaling**2 / 2)
    shift = mean.view(batch, kv_heads, 1, -1, dim) * logits.scaling
    logs = k.new_empty(batch, kv_heads, shift.shape[3], n, dtype=torch.float32)
    # Products are D wide, the window's logits w: shorter blocks take the same memory.
    for at in _split(n, max(BLOCK * observed.window.shape[2] // dim, 64)):
        keys = k[:, :, at].float()
        product = (keys @ sides).view(batch, kv_heads, keys.shape[2], -1, dim)
        logs[..., at] = product.add_(shift).mul_(keys[:, :, :, None]).sum(-1).mT
    floor = torch.finfo(torch.float32)
    logs.nan_to_num_(nan=-torch.inf, posinf=floor.max, neginf=-torch.inf)
    if visible is not None:
        logs.masked_fill_(~visible[:, :, None, :n], -torch.inf)
    logs.sub_(logs.amax(-1, keepdim=True).clamp_min(floor.min)).exp_()
    logs.div_(logs.sum(-1, keepdim=True).clamp_min(floor.tiny))
    return logs.mean(2)


def _measure_values(v: Tensor, visible: Tensor | None) -> Tensor:
    """Return the norms of values relative to the mean of their head's visible ones, [B, Hkv, S]."""
    norms = v.new_empty(v.shape[:3], dtype=torch.float32)
    for at in _split(v.shape[2], BLOCK):
        norms[..., at] = torch.linalg.vector_norm(v[:, :, at].float(), dim=-1)
    norms.nan_to_num_(nan=0.0, posinf=0.0)
    if visible is None:
        mean = norms.mean(-1, keepdim=True)
    else:
        norms.masked_fill_(~visible, 0.0)
        mean = norms.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1)
    return norms.div_(mean.clamp_min(torch.finfo(torch.float32).tiny))
