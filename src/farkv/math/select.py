"""Choose records by score: at most a cap, fewer under a threshold or a mass target.

In: pooled scores per KV head. Out: positions in ascending order, padded to the cap; the count stays on the device
as validity flags, valid positions first. No host sync, no loop over heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Float32, Int, Tensor


class Choice(NamedTuple):
    """Chosen positions per sequence and KV head; `valid` is None where all K are valid.

    counts: where it is known, how many are valid, and they stand first; `valid` may then be left out.
    odds: what is added to each one's logit, since it stands for others too (math/sampling.py); None: nothing.
    """

    positions: Int[Tensor, "B Hkv K"]
    valid: Bool[Tensor, "B Hkv K"] | None
    counts: Int[Tensor, "B Hkv"] | None = None
    odds: Float32[Tensor, "B Hkv K"] | None = None

    def flag(self) -> Choice:
        """Return this choice with flags in place of counts."""
        if self.counts is None:
            return self
        valid = torch.arange(self.positions.shape[-1], device=self.positions.device) < self.counts[..., None]
        return Choice(self.positions.masked_fill(~valid, 0), valid, odds=self.odds)


def force_sinks(
    scores: Float32[Tensor, "B Hkv S"],
    n_sinks: int | Int[Tensor, "b 1 1"],
    valid: Bool[Tensor, "b h S"] | None,
    recent: Bool[Tensor, "b h S"] | None = None,
) -> Float32[Tensor, "B Hkv S"]:
    """Give the first `n_sinks` real tokens of every sequence, and those flagged `recent`, a score of inf, in place."""
    if isinstance(n_sinks, int) and n_sinks == 0 and recent is None:
        return scores
    if valid is None:
        scores[..., :n_sinks] = torch.inf
        return scores
    first = valid & (valid.cumsum(-1) <= n_sinks)
    return scores.masked_fill_(first if recent is None else first | recent, torch.inf)


def find_recent(valid: Bool[Tensor, "b h S"], n_recent: Int[Tensor, "b 1 1"]) -> Bool[Tensor, "b h S"]:
    """Return the last `n_recent` real tokens of every sequence."""
    return valid & (valid.flip(-1).cumsum(-1).flip(-1) <= n_recent)


def select_top(scores: Float32[Tensor, "B Hkv S"], cap: int, own: Int[Tensor, "b 1 1"] | None = None) -> Choice:
    """Choose the `cap` best records of every KV head. Cost: one top-k over S per KV head.

    Args:
        own: each sequence's own cap, at most `cap`; None where all have the same.
    """
    if own is not None:
        return select_seen(scores, cap, own)
    positions = scores.topk(cap, -1, sorted=False).indices
    return Choice(positions.sort(-1).values, None)


def select_seen(scores: Float32[Tensor, "B Hkv S"], cap: int, own: Int[Tensor, "b 1 1"] | None = None) -> Choice:
    """Choose the `cap` best records of every KV head, fewer where the others are excluded (-inf)."""
    values, positions = _take_best(scores, cap, own)
    return _pack(positions, _within(values > -torch.inf, own), scores.shape[-1])


def limit_pages(
    scores: Float32[Tensor, "B Hkv S"], resident: Bool[Tensor, "B Hkv P"], page_tokens: int, n_pages: int
) -> Float32[Tensor, "B Hkv S"]:
    """Exclude, by a score of -inf, records on disk pages that this step may not read.

    It may read, per KV head, the `n_pages` pages with the most estimated weight among those without a copy in memory.

    Args:
        scores: logs of estimated weights (sinks may be forced to +inf).
        resident: full pages that have a copy; tokens after the last full page are always in memory.

    Cost: one pass over the scores and a top-k over the pages.
    """
    batch, heads, n = scores.shape
    last = min(resident.shape[-1], -(-n // page_tokens))
    if last == 0:
        return scores
    # The last full page may reach into the recent window, which is not scored.
    padded = torch.nn.functional.pad(scores, (0, max(0, last * page_tokens - n)), value=-torch.inf)
    paged = padded[..., : last * page_tokens].view(batch, heads, last, page_tokens)
    seen = resident[..., :last]
    mass = paged.logsumexp(-1).masked_fill(seen, -torch.inf)
    best = mass.topk(min(n_pages, last), -1, sorted=False).indices
    seen = seen.scatter(-1, best, value=True)
    reach = seen.repeat_interleave(page_tokens, -1)[..., :n]
    reach = torch.nn.functional.pad(reach, (0, n - reach.shape[-1]), value=True)
    return scores.masked_fill(~reach, -torch.inf)


def select_within(
    scores: Float32[Tensor, "B Hkv S"], cap: int, alpha: float, own: Int[Tensor, "b 1 1"] | None = None
) -> Choice:
    """Choose the records within `alpha` of the best, per sequence and KV head, at most `cap`.

    Source: InfiniGen §4.3; deviation: a count per sequence and KV head instead of one mean per layer.
    """
    values, positions = _take_best(scores, cap, own)
    finite = torch.where(values.isinf(), -torch.inf, values)
    keep = values > finite.amax(-1, keepdim=True) - alpha
    return _pack(positions, _within(keep, own), scores.shape[-1])


def select_mean_count(
    scores: Float32[Tensor, "B Hkv S"], cap: int, alpha: float, own: Int[Tensor, "b 1 1"] | None = None
) -> Choice:
    """Choose one count for all heads and sequences of the layer: the mean count within `alpha`, at most `cap`.

    Couples the sequences of a batch. Source: InfiniGen §4.3 as published, except that the mean stays on the device.
    """
    counts = (scores > scores.amax(-1, keepdim=True) - alpha).sum(-1)
    mean = counts.float().mean().floor().clamp(1, cap)
    positions = scores.topk(cap, -1).indices
    keep = (torch.arange(cap, device=scores.device) < mean).expand_as(positions)
    return _pack(positions, _within(keep, own), scores.shape[-1])


def select_mass(
    log_weights: Float32[Tensor, "B Hkv S"], cap: int, top_p: float, own: Int[Tensor, "b 1 1"] | None = None
) -> Choice:
    """Choose the fewest records whose estimated attention weights sum to `top_p`, at most `cap`.

    Args:
        log_weights: logs of weights that sum to 1 over S (sinks may be forced to +inf).
    """
    values, positions = log_weights.topk(cap, -1)
    weights = torch.where(values.isposinf(), 0.0, values.exp())
    before = weights.cumsum(-1) - weights
    keep = values.isposinf() | ((before < top_p) & (values > -torch.inf))
    return _pack(positions, _within(keep, own), log_weights.shape[-1])


class VariedChoice(NamedTuple):
    """A choice whose size differs from head to head.

    counts: how many records each head chose, those of a padded sequence's window apart.  floors: the least weight of
    these, forced ones apart; 0 where there is none.
    """

    choice: Choice
    counts: Int[Tensor, "B Hkv"]
    floors: Float32[Tensor, "B Hkv"]


def select_above(
    log_weights: Float32[Tensor, "B Hkv S"],
    caps: Int[Tensor, " B"],
    fewest: Int[Tensor, " B"],
    least: Float32[Tensor, " B"],
    recent: Int[Tensor, " B"],
) -> VariedChoice:
    """Choose the records of at least a weight, `fewest` at least and `caps` at most; forced ones (+inf) always.

    Args:
        log_weights: logs of weights that sum to 1 over S, mean over a query group.
        recent: of each sequence's forced records, those of its window, which are not counted.
    """
    values, positions = log_weights.topk(int(caps.max()), -1)
    place, known = torch.arange(values.shape[-1], device=values.device), values > -torch.inf
    heavy = (values >= least.log()[:, None, None]) & (place < caps[:, None, None])
    keep = known & (heavy | (place < torch.minimum(fewest, caps)[:, None, None]))
    # A place more, so that there is a least one.
    weights = torch.nn.functional.pad(values.masked_fill(~keep, torch.inf), (0, 1), value=torch.inf)
    floors = weights.amin(-1)
    choice, counts = _pack(positions, keep, log_weights.shape[-1]), keep.sum(-1)
    floors = torch.where(floors.isinf(), 0.0, floors.exp())
    return VariedChoice(choice._replace(counts=counts), counts - recent[:, None], floors)


def _take_best(scores: Tensor, cap: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the best scores and their positions, best first where sequences have their own caps."""
    best = scores.topk(cap, -1, sorted=own is not None)
    return best.values, best.indices


def _within(keep: Tensor, own: Tensor | None) -> Tensor:
    """Limit records, sorted best first, to each sequence's own cap."""
    return keep if own is None else keep & (torch.arange(keep.shape[-1], device=keep.device) < own)


def _pack(positions: Tensor, keep: Tensor, n: int) -> Choice:
    """Sort by position, valid ones first."""
    key = torch.where(keep, positions, positions + n).sort(-1).values
    return Choice(torch.where(key >= n, key - n, key), key < n)


def select_rest(
    scores: Float32[Tensor, "B Hkv S"], taken: Choice, cap: int, own: Int[Tensor, "b 1 1"] | None = None
) -> Choice:
    """Choose the `cap` best records that are not taken; fewer where only padding is left. Overwrites `scores`.

    Validity matters here: without it, a sequence with fewer real tokens than the cap would read a record twice.
    """
    return select_seen(forbid(scores, taken), cap, own)


def forbid(scores: Float32[Tensor, "B Hkv S"], choice: Choice) -> Float32[Tensor, "B Hkv S"]:
    """Give records that are already chosen a score of -inf, in place."""
    if choice.valid is None:
        return scores.scatter_(-1, choice.positions, -torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, choice.positions, choice.valid)
    return scores.masked_fill_(chosen, -torch.inf)
