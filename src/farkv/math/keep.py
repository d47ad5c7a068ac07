"""Choose which records of a layer stay: the newest, and the highest-scored of the others.

In: a score per record. Out: positions and their scores. Stateless; moves no records.
"""

from __future__ import annotations

import torch

from farkv._axes import Float, Float32, Int, Tensor


def join_scores(scores: Float32[Tensor, "B Hkv N"], old: Float[Tensor, "B Hkv S"]) -> Float32[Tensor, "B Hkv N"]:
    """Return the larger of a record's new and old score, so that one that was important once is not evicted at once."""
    return torch.maximum(scores, old[..., : scores.shape[-1]].float())


def choose_kept(
    scores: Float32[Tensor, "B Hkv N"], n_rows: int, n_keep: int, n_recent: int
) -> tuple[Int[Tensor, "B Hkv K"], Float32[Tensor, "B Hkv K"]]:
    """Keep the `n_recent` newest of `n_rows` records and the best of the others, `n_keep` in all, per KV head.

    Args:
        scores: of the first N >= n_rows - n_recent records.

    Returns:
        Positions, ascending, K = min(max(n_keep, n_recent), n_rows), and their scores, 0 for the newest.

    Cost: one top-k over N per KV head.
    Source: SnapKV's selection, as XKV uses it: every head keeps its own best, all heads of a layer equally many.
    """
    batch, heads = scores.shape[:2]
    n_recent = min(n_recent, n_rows)
    n_old = n_rows - n_recent
    best = scores[..., :n_old].topk(min(max(n_keep - n_recent, 0), n_old), -1, sorted=False).indices.sort(-1).values
    newest = torch.arange(n_old, n_rows, device=scores.device).expand(batch, heads, -1)
    # Sinks are forced by an infinite score, which must not be compared with later scores.
    kept = scores.gather(-1, best).nan_to_num(posinf=0.0)
    return torch.cat([best, newest], -1), torch.nn.functional.pad(kept, (0, n_recent))
