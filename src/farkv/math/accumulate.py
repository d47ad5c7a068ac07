"""Accumulated attention: the weight that every stored record received from all queries that could see it.

In: queries of the newest tokens, keys. Out: sums, which later passes and steps add to. Reads K in blocks; stateless.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.math.importance import walk_weights
from farkv.math.logits import Logits

# Queries weighed at a time on each block of keys.
QUERIES_AT_ONCE = 64


@torch.no_grad()
def add_weights(
    sums: Float32[Tensor, "B Hkv S"],
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B Hkv S D"],
    visible: Bool[Tensor, "B h S"] | None,
    logits: Logits,
) -> None:
    """Add in place, to every record, the attention weight from the queries of the newest T of S tokens:

        s_j += sum_i mean_g softmax_j(softcap(scaling q_gi . k_j))   over queries i >= j, the mean over the query group

    A prompt read in chunks gives the same sums as in one pass, to rounding: later chunks add to earlier keys, and
    attention is causal.

    Args:
        sums: for all S records; those of the newest tokens start at 0.
        q: after RoPE, oldest first.
        visible: False on padding, which receives no weight and, as a query, gives none; h is 1 or Hkv.

    Cost: 4 Hq T S D operations (the logits twice: once for the softmax's sums, half of that where T = S), and
    8 MiB of weights; never T x S.
    Source: H2O's accumulated scores; deviations: the mean over the query group, because KV is kept per KV head; learned
    sink logits are left out of the denominator.
    """
    end = k.shape[2] - q.shape[2]
    for some in q.split(QUERIES_AT_ONCE, 2):
        end += some.shape[2]
        seen = None if visible is None else visible[..., :end]
        for at, weights in walk_weights(some, k[:, :, :end], seen, logits, 3):
            sums[..., at] += weights.mean(2)
