"""Choose by the fast kernel: one call for a batch without padding, one for each sequence of a padded one.

In: a layer's index, a query, a budget. Out: the choice that the plain operations make, near-ties aside. A sequence of a
padded batch is chosen from as if it were alone: its index begins behind its padding, its cap is its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Tensor
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import IndexView, Logits, Native
from farkv.math.select import Choice
from farkv.methods.contract import Budget, Query


class Job(NamedTuple):
    """What is chosen from: the index's first `n` records, by a query, on one machine's kernels."""

    kernels: Native | Gpu
    view: IndexView
    query: Query
    n: int


class Share(NamedTuple):
    """One sequence's part of a padded batch: where its open records begin and end, and how many it may choose.

    recent: of the records behind those, how many are read anyway.
    """

    start: int
    stop: int
    cap: int
    n_sinks: int = 0
    n_recent: int = 0


def choose_alike(job: Job, cap: int, n_sinks: int, taken: Tensor | None) -> Choice:
    """Choose `cap` records of every sequence and KV head."""
    if cap == 0:
        return Choice(torch.empty(*job.view.codes.shape[:2], 0, dtype=torch.int64, device=job.query.q.device), None)
    logits = Logits(job.query.scaling, job.query.softcap)
    chosen = job.kernels.select(job.query.q, job.view, logits, cap=cap, n=job.n, sinks=n_sinks, taken=taken)
    return Choice(chosen, None)


def choose_each(job: Job, shares: list[Share], taken: Choice | None) -> Choice:
    """Choose for one sequence after the other; the valid ones stand first.

    Args:
        taken: what may not be chosen again, its valid ones first and as many for every KV head.
    """
    heads = job.view.codes.shape[1]
    width = max(share.cap + share.n_recent for share in shares)
    positions = torch.zeros(len(shares), heads, width, dtype=torch.int64)
    valid = torch.zeros(len(shares), heads, width, dtype=torch.bool)
    for b, share in enumerate(shares):
        out = choose_one(job, b, share, taken)
        positions[b, :, : out.shape[-1]] = out
        valid[b, :, : out.shape[-1]] = True
    return Choice(positions, valid)


def choose_one(job: Job, b: int, share: Share, taken: Choice | None) -> Tensor:
    """Return the places that sequence `b` reads, ascending, [Hkv, K]."""
    view, n_open = job.view, max(0, share.stop - share.start)
    gone = None if taken is None else cut_taken(taken, b, share)
    cap = max(0, min(share.cap, n_open - (0 if gone is None else gone.shape[-1])))
    # Of sequences that share a projection there is one.
    shared = 0 if len(view.query) == 1 else b
    own = view._replace(
        codes=view.codes[b : b + 1, :, share.start : share.start + n_open],
        query=view.query[shared : shared + 1],
        scale=view.scale[b : b + 1],
    )
    alone = job._replace(view=own, query=job.query._replace(q=job.query.q[b : b + 1]), n=n_open)
    chosen = choose_alike(alone, cap, min(share.n_sinks, cap), gone).positions[0] + share.start
    recent = torch.arange(share.stop, share.stop + share.n_recent).expand(chosen.shape[0], -1)
    return torch.cat([chosen, recent], -1)


def cut_taken(taken: Choice, b: int, share: Share) -> Tensor:
    """Return what sequence `b` has taken of its open records, counted from its own begin, [1, Hkv, N]."""
    assert taken.valid is not None
    # Every KV head has taken as many.
    n = int((taken.valid[b, 0] & (taken.positions[b, 0] < share.stop)).sum())
    return taken.positions[b : b + 1, :, :n] - share.start


def share_early(budget: Budget, starts: list[int], n: int) -> list[Share]:
    """Return every sequence's part of what is chosen early of the first `n` records."""
    assert budget.own is not None
    own = budget.own
    n_recent = [0] * len(starts) if own.recent is None else own.recent.flatten().tolist()
    parts = zip(starts, n_recent, own.early.flatten().tolist(), own.sinks.flatten().tolist(), strict=True)
    return [Share(start, n - recent, early - recent, sinks, recent) for start, recent, early, sinks in parts]


def share_late(budget: Budget, starts: list[int], n: int) -> list[Share]:
    """Return every sequence's part of what is chosen late."""
    assert budget.own is not None
    late = budget.own.late.flatten().tolist()
    early = share_early(budget, starts, n)
    return [Share(e.start, e.stop, n_late) for e, n_late in zip(early, late, strict=True)]
