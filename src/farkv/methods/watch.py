"""When a layer's index is looked at for drift, and the newest queries that this needs.

In: passes, as their queries come. Out: a `Watch`, immutable and replaced by every pass that changes it; it knows no
records. Every sequence of a batch is looked at by its own number of tokens, as it would be alone.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch

from farkv._axes import Bool, Float, Float32, Int, Tensor
from farkv.math.drift import EVERY, QUERIES, find_next, measure_unexplained
from farkv.store.near.index import Projection

NEVER = sys.maxsize


class Watch(NamedTuple):
    """What is known of drift.

    shares: of every sequence, what its index left unexplained when it was last fitted; nan: not known yet.  at: how
    many tokens of its own it has when it is looked at next.  wake: the context's tokens when the first of them does.
    asleep: up to so many tokens nothing is done at all.  queries: of the newest tokens, from then on, pass by pass, and
    of how many: a look's worth, and no more than a pass besides.
    """

    shares: list[float] | None = None
    at: list[int] | None = None
    wake: int = 0
    asleep: int = 0
    queries: tuple[Tensor, ...] = ()
    n_queries: int = 0

    @property
    def is_ready(self) -> bool:
        """Say whether there are queries enough to look."""
        return self.n_queries >= QUERIES

    def get_newest(self) -> Tensor | None:
        """Return the newest queries, as many as one look takes, [B, Hq, N, D]."""
        return torch.cat(self.queries, 2)[:, :, -QUERIES:] if self.queries else None

    def wake_up(self) -> Watch:
        """Return a watch that knows of no fit: the prompt goes on."""
        return Watch(queries=self.queries, n_queries=self.n_queries)


def look_at(
    queries: Float[Tensor, "B Hq N D"],
    keys: Float[Tensor, "B Hkv M D"],
    told: Float[Tensor, "B Hkv M R"],
    projection: Projection,
    real: Bool[Tensor, "B S"] | None,
) -> Float32[Tensor, " B"]:
    """Return the share of the newest queries' scores of the newest keys that an index leaves unexplained.

    Args:
        told: projected keys as the index tells them.
        real: which of the context's tokens, these the last of them, are no padding.
    """
    q = queries.float().reshape(*keys.shape[:2], -1, keys.shape[3])
    exact = q @ (keys.float() - projection.mean).mT
    estimated = (q @ projection.query) @ told.float().mT
    if real is None:
        return measure_unexplained(exact, estimated, None, None)
    n_groups = q.shape[2] // queries.shape[2]
    asked = real[:, -queries.shape[2] :].repeat(1, n_groups)
    return measure_unexplained(exact, estimated, asked, real[:, -keys.shape[2] :])


def keep_newest(watch: Watch, q: Float[Tensor, "B Hq T D"]) -> Watch:
    """Keep the newest queries. Cost: one copy of this pass's, `QUERIES` at most."""
    # A copy: a view would keep the whole pass's queries alive.
    newest = (q if q.shape[2] == 1 else q[:, :, -QUERIES:]).clone()
    parts, n = (*watch.queries, newest), watch.n_queries + newest.shape[2]
    while n - parts[0].shape[2] >= QUERIES:
        n -= parts[0].shape[2]
        parts = parts[1:]
    return watch._replace(queries=parts, n_queries=n)


def find_woken(watch: Watch, own: list[int]) -> list[int]:
    """Return the sequences that are to be looked at, of so many tokens of their own."""
    if watch.at is None or not watch.is_ready:
        return []
    return [i for i, (n, at) in enumerate(zip(own, watch.at, strict=True)) if n >= at]


def note_shares(watch: Watch, found: dict[int, float], own: list[int], *, fitted: bool) -> Watch:
    """Note what some sequences' indexes leave unexplained, and when each is looked at next.

    Args:
        fitted: they were fitted just now; else they were looked at and are well, and only unknown shares are noted.
    """
    shares, at = list(watch.shares or [math.nan] * len(own)), list(watch.at or [0] * len(own))
    for i, share in found.items():
        if fitted or math.isnan(shares[i]):
            shares[i] = share
        at[i] = find_next(own[i]) if fitted else own[i] + EVERY
    return watch._replace(shares=shares, at=at)


def rest(watch: Watch, own: list[int], n_tokens: int, young: list[bool]) -> Watch:
    """Return a watch that sleeps until a sequence is due; one that still grows into its first fit keeps it awake.

    Args:
        own: each sequence's tokens.
        n_tokens: the context's.
    """
    if watch.at is None:
        return watch
    # What was cut off before a look was due is not waited for.
    at = [min(a, find_next(n)) for a, n in zip(watch.at, own, strict=True)]
    due = [a - n for a, n, grows in zip(at, own, young, strict=True) if not grows]
    wake = n_tokens + min(due) if due else NEVER
    asleep = 0 if any(young) else wake - QUERIES
    if asleep > n_tokens:
        watch = watch._replace(queries=(), n_queries=0)
    return watch._replace(at=at, wake=wake, asleep=asleep)


def crop_watch(watch: Watch, n_tokens: int) -> Watch:
    """Forget the queries of tokens that are gone; look again soon, whatever follows."""
    wake = min(watch.wake, n_tokens + EVERY)
    return watch._replace(queries=(), n_queries=0, wake=wake, asleep=min(watch.asleep, wake - QUERIES))


def select_watch(watch: Watch, order: list[int], sequences: Int[Tensor, " N"]) -> Watch:
    """Keep these sequences of the batch, in this order."""
    return watch._replace(
        shares=None if watch.shares is None else [watch.shares[i] for i in order],
        at=None if watch.at is None else [watch.at[i] for i in order],
        queries=tuple(q.index_select(0, sequences.to(q.device)) for q in watch.queries),
    )


def join_watches(watch: Watch, other: Watch, batches: tuple[int, int]) -> Watch:
    """Return the watch of both batches' sequences, the second's behind the first's; it wakes at once to rest anew."""
    pair = list(zip((watch, other), batches, strict=True))
    return Watch(
        [share for each, n in pair for share in each.shares or [math.nan] * n],
        [at for each, n in pair for at in each.at or [0] * n],
    )
