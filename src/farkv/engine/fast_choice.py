"""Choose by the fast kernel: one call for a batch without padding, one for each sequence of a padded one.

In: a layer's index, a query, a budget. Out: the choice that the plain operations make, near-ties aside. A sequence of a
padded batch is chosen from as if it were alone: its index begins behind its padding, its cap is its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Tensor
from farkv.engine.bank import Terms
from farkv.engine.budget import Budget
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import IndexView, Native
from farkv.kernels.ways import Drawn, Paged, Varied
from farkv.math.select import Choice, VariedChoice
from farkv.math.step import Query


class Scored(NamedTuple):
    """What is chosen from: the index's first `n` records, by a query, on one machine's kernels.

    starts: where every sequence's own tokens begin, in a padded batch.
    """

    kernels: Native | Gpu
    view: IndexView
    query: Query
    n: int
    starts: list[int] | None


class Pages(NamedTuple):
    """Which pages of a layer a step may read: those that are in memory, and `more` of every KV head besides."""

    here: Bool[Tensor, "B Hkv P"]
    tokens: int
    more: int


class Part(NamedTuple):
    """One sequence's part of a padded batch: where its open records begin and end, and how many it may choose.

    n_recent: of the records behind those, how many are read anyway.
    """

    start: int
    stop: int
    cap: int
    n_sinks: int = 0
    n_recent: int = 0


def choose_early(scored: Scored, budget: Budget) -> Choice:
    """Choose `budget.early` records of every sequence and KV head, sinks first."""
    if budget.own is None:
        return choose_alike(scored, budget.early, budget.sinks, None)
    return choose_each(scored, split_early(budget, scored), None)


def choose_late(scored: Scored, budget: Budget, taken: Choice) -> Choice:
    """Choose `budget.late` more than are taken."""
    if budget.own is None:
        return choose_alike(scored, budget.late, 0, taken.positions)
    late = budget.own.late.flatten().tolist()
    parts = [Part(e.start, e.stop, n) for e, n in zip(split_early(budget, scored), late, strict=True)]
    return choose_each(scored, parts, taken)


def choose_drawn(scored: Scored, budget: Budget, seeds: Tensor) -> Choice:
    """Draw `budget.early` records of every sequence and KV head that has a seed, sinks first; of others the best."""
    assert isinstance(scored.kernels, Native)
    if budget.own is None:
        return draw_alike(scored, budget.early, budget.sinks, seeds)
    parts = split_early(budget, scored)
    width = max(part.cap + part.n_recent for part in parts)
    positions = torch.zeros(*seeds.shape, width, dtype=torch.int64)
    valid, odds = torch.zeros_like(positions, dtype=torch.bool), torch.zeros(*seeds.shape, width)
    for b, part in enumerate(parts):
        alone = cut_sequence(scored, b, part)
        cap = min(part.cap, alone.n)
        drawn = draw_alike(alone, cap, min(part.n_sinks, cap), seeds[b : b + 1])
        stop = cap + part.n_recent
        positions[b, :, :cap], positions[b, :, cap:stop] = drawn.positions[0] + part.start, recent_of(part)
        odds[b, :, :cap] = 0 if drawn.odds is None else drawn.odds[0]
        valid[b, :, :stop] = True
    return Choice(positions, valid, odds=odds)


def choose_paged(scored: Scored, cap: int, n_sinks: int, pages: Pages, taken: Choice | None) -> Choice:
    """Choose up to `cap` records of every sequence and KV head that are in reach, and not taken."""
    query, view = scored.query, scored.view
    counts = torch.zeros(view.codes.shape[:2], dtype=torch.int64)
    gone = None
    if taken is not None:
        # What is not valid is not taken: another one that is, in its place.
        gone = taken.positions if taken.valid is None else taken.positions.where(taken.valid, taken.positions[..., :1])
    if cap == 0:
        return choose_alike(scored, 0, 0, None)
    assert isinstance(scored.kernels, Native)
    paged = Paged(pages.here.contiguous(), pages.tokens, pages.more, counts)
    out = scored.kernels.select(
        query.q, view, query.logits, cap=cap, n=scored.n, sinks=n_sinks, taken=gone, paged=paged
    )
    if int(counts.min()) == cap:
        return Choice(out, None)
    return Choice(out, None, counts).flag()


def draw_alike(scored: Scored, cap: int, n_sinks: int, seeds: Tensor) -> Choice:
    """Choose `cap` records of every sequence and KV head, drawn where it has a seed."""
    if cap in (0, scored.n):
        return choose_alike(scored, cap, n_sinks, None)
    query, view = scored.query, scored.view
    assert isinstance(scored.kernels, Native)
    drawn = Drawn(seeds.contiguous(), torch.empty(*seeds.shape, cap, dtype=torch.float32))
    chosen = scored.kernels.select(query.q, view, query.logits, cap=cap, n=scored.n, sinks=n_sinks, drawn=drawn)
    return Choice(chosen, None, odds=drawn.odds)


def recent_of(part: Part) -> Tensor:
    """Return the places that are read because they are recent."""
    return torch.arange(part.stop, part.stop + part.n_recent)


def choose_varied(scored: Scored, budget: Budget, terms: Terms) -> VariedChoice:
    """Choose what weighs at least so much, each sequence up to its cap, sinks first."""
    heads = scored.view.codes.shape[:2]
    assert isinstance(scored.kernels, Native)
    own = [torch.tensor(part).clamp_(max=scored.n) for part in (terms.caps, terms.fewest)]
    least, counts = torch.tensor(terms.least), torch.zeros(heads, dtype=torch.int64)
    varied = Varied(own[0], least, own[1], counts, torch.zeros(heads, dtype=torch.float32))
    cap = max(varied.caps.tolist())
    if budget.own is not None:
        parts = [part._replace(cap=int(n)) for part, n in zip(split_early(budget, scored), varied.caps, strict=True)]
        return VariedChoice(choose_each(scored, parts, None, varied), varied.counts, varied.floors)
    query, view = scored.query, scored.view
    if cap == 0:
        nothing = Choice(torch.empty(*heads, 0, dtype=torch.int64), None, varied.counts)
        return VariedChoice(nothing, varied.counts, varied.floors)
    positions = scored.kernels.select(
        query.q, view, query.logits, cap=cap, n=scored.n, sinks=budget.sinks, varied=varied
    )
    choice = Choice(positions[..., : int(varied.counts.max())].contiguous(), None, varied.counts)
    return VariedChoice(choice, varied.counts, varied.floors)


def choose_alike(scored: Scored, cap: int, n_sinks: int, taken: Tensor | None) -> Choice:
    """Choose `cap` records of every sequence and KV head."""
    query, view = scored.query, scored.view
    if cap == 0:
        return Choice(torch.empty(*view.codes.shape[:2], 0, dtype=torch.int64, device=query.q.device), None)
    chosen = scored.kernels.select(query.q, view, query.logits, cap=cap, n=scored.n, sinks=n_sinks, taken=taken)
    return Choice(chosen, None)


def choose_each(scored: Scored, parts: list[Part], taken: Choice | None, varied: Varied | None = None) -> Choice:
    """Choose for one sequence after the other; the valid ones stand first.

    Args:
        taken: what may not be chosen again, its valid ones first and as many for every KV head.
    """
    heads = scored.view.codes.shape[1]
    width = max(part.cap + part.n_recent for part in parts)
    positions = torch.zeros(len(parts), heads, width, dtype=torch.int64)
    valid = torch.zeros(len(parts), heads, width, dtype=torch.bool)
    for b, part in enumerate(parts):
        if varied is not None:
            for h, out in enumerate(vary_one(scored, b, part, varied)):
                positions[b, h, : len(out)] = out
                valid[b, h, : len(out)] = True
            continue
        out = choose_one(scored, b, part, taken)
        positions[b, :, : out.shape[-1]] = out
        valid[b, :, : out.shape[-1]] = True
    return Choice(positions, valid)


def vary_one(scored: Scored, b: int, part: Part, varied: Varied) -> list[Tensor]:
    """Return the places that every KV head of sequence `b` reads, ascending."""
    alone = cut_sequence(scored, b, part)
    own = Varied._make(x[b : b + 1].contiguous() for x in varied)
    cap, out = min(part.cap, alone.n), torch.empty(1, varied.counts.shape[1], 0, dtype=torch.int64)
    own.caps.fill_(cap)
    own.fewest.clamp_(max=cap)
    if cap:
        kernels, query = scored.kernels, alone.query
        assert isinstance(kernels, Native)
        sinks = min(part.n_sinks, cap)
        out = kernels.select(query.q, alone.view, query.logits, cap=cap, n=alone.n, sinks=sinks, varied=own)
    varied.counts[b], varied.floors[b] = own.counts[0], own.floors[0]
    counts, recent = own.counts[0].tolist(), recent_of(part)
    return [torch.cat([out[0, h, :n] + part.start, recent]) for h, n in enumerate(counts)]


def cut_sequence(scored: Scored, b: int, part: Part) -> Scored:
    """Return what sequence `b` is chosen from, as if it were alone."""
    view, n_open = scored.view, max(0, part.stop - part.start)
    # Of sequences that share a projection there is one.
    shared = 0 if len(view.query) == 1 else b
    own = view._replace(
        codes=view.codes[b : b + 1, :, part.start : part.start + n_open],
        query=view.query[shared : shared + 1],
        tables=view.tables[b : b + 1],
    )
    return scored._replace(view=own, query=scored.query._replace(q=scored.query.q[b : b + 1]), n=n_open)


def choose_one(scored: Scored, b: int, part: Part, taken: Choice | None) -> Tensor:
    """Return the places that sequence `b` reads, ascending, [Hkv, K]."""
    n_open = max(0, part.stop - part.start)
    gone = None if taken is None else cut_taken(taken, b, part)
    cap = max(0, min(part.cap, n_open - (0 if gone is None else gone.shape[-1])))
    alone = cut_sequence(scored, b, part)
    chosen = choose_alike(alone, cap, min(part.n_sinks, cap), gone).positions[0] + part.start
    return torch.cat([chosen, recent_of(part).expand(chosen.shape[0], -1)], -1)


def cut_taken(taken: Choice, b: int, part: Part) -> Tensor:
    """Return what sequence `b` has taken of its open records, counted from its own begin, [1, Hkv, N]."""
    assert taken.valid is not None
    # Every KV head has taken as many.
    n = int((taken.valid[b, 0] & (taken.positions[b, 0] < part.stop)).sum())
    return taken.positions[b : b + 1, :, :n] - part.start


def split_early(budget: Budget, scored: Scored) -> list[Part]:
    """Return every sequence's part of what is chosen early."""
    own, starts, n = budget.own, scored.starts, scored.n
    assert own is not None
    assert starts is not None
    n_recent = [0] * len(starts) if own.recent is None else own.recent.flatten().tolist()
    parts = zip(starts, n_recent, own.early.flatten().tolist(), own.sinks.flatten().tolist(), strict=True)
    return [Part(start, n - recent, early - recent, sinks, recent) for start, recent, early, sinks in parts]
