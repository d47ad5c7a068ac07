"""InfiniGen: speculate one layer ahead which records attention will need, fetch only those.

The steps, in the paper's order (docs/papers/infinigen.md has equation, function and deviation):
  once per model     skew: a basis in which few columns decide the scores     (`math.skew`, in the profile)
  once per prompt    index: partial keys of every token                       (`methods.indexed`, `math.index`)
  every layer, step  speculate: score layer i's index with an estimated query (`math.score`)
                     select: threshold and cap                                (`math.select`)
                     fetch: only the chosen records cross the link            (`store.tiers`)
                     attend, and top up what the true query finds missing
"""

from __future__ import annotations

from farkv._axes import Tensor
from farkv.calibrate.profile import Profile
from farkv.config import InfiniGen
from farkv.errors import ConfigError
from farkv.kernels.native import IndexView
from farkv.math.score import pool_group, pool_group_by_best, project_query, score_index, unpack_codes
from farkv.math.select import (
    Choice,
    forbid,
    force_sinks,
    select_mass,
    select_mean_count,
    select_rest,
    select_top,
    select_within,
)
from farkv.methods.contract import Budget, Place, Query
from farkv.methods.fast_choice import Job, choose_alike, choose_each, share_early, share_late
from farkv.methods.indexed import Indexed
from farkv.store.tiers import Fetch


class InfiniGenRecipe(Indexed):
    """The published algorithm (`paper=True`) and the better default, in one order of steps."""

    def __init__(self, place: Place, config: InfiniGen, profile: Profile | None):
        super().__init__(place, config, profile)
        if config.paper:
            self.fraction = share_beside_dense(config.need_fraction, len(place.layers), 1)

    # --- every layer, every step ----------------------------------------------------------------------------

    def reads_all(self, layer: int) -> bool:
        """The paper leaves the first layer dense; ours knows its true query."""
        return self.config.paper and layer == self.layers[0]

    def wants_estimate(self, layer: int) -> bool:
        """Every sparse layer with records is speculated; ours not where it reads them in place: nothing travels."""
        if not self.store.travels and not self.config.paper:
            return False
        return not self.dense and not self.reads_all(layer) and self.store.length(layer) > 0

    def speculate(self, layer: int, estimate: Query) -> None:
        """1. Score the index.  2. Select.  3. Start the fetch; it travels while layer i-1 goes on."""
        budget = self.share(self.store.seen(layer) + 1, layer)
        chosen = self.score_and_select(layer, estimate, self.store.length(layer) + 1, budget)
        early = self.store.fetch(layer, chosen.positions, chosen.valid, budget.late + budget.tail)
        self.pending[layer] = early, budget

    def choose(self, layer: int, query: Query, budget: Budget) -> Choice:
        """The first layer: its true query is known at once."""
        return self.score_and_select(layer, query, self.store.length(layer), budget)

    def score_and_select(self, layer: int, query: Query, rows: int, budget: Budget) -> Choice:
        """Choose `budget.early` of `rows` records, the newest and not yet indexed one included, but for the tail."""
        n_old = rows - budget.tail
        self.catch_up(layer, n_old)
        job = self._prepare_fast(layer, query, n_old)
        if job is None:
            return self.select_records(layer, self.score(layer, query, n_old), budget)
        if budget.own is None:
            return choose_alike(job, budget.early, budget.sinks, None)
        return choose_each(job, share_early(budget, self.find_starts(rows), n_old), None)

    def _prepare_fast(self, layer: int, query: Query, n_old: int) -> Job | None:
        """Say what the fast kernel chooses from; None where it does not know the rule or the records."""
        config, kernels, index = self.config, self.fast.kernels, self.index[layer]
        by_cap = not config.paper and config.alpha is None and config.top_p is None
        if kernels is None or not by_cap or self.reaches_disk(layer) or not self.may_select(layer, query):
            return None
        assert index.projection is not None
        codes = index.codes()
        self.count_index(layer, codes[:, :, :n_old].numel() * codes.element_size())
        self.account.kernels.add(kernels.name)
        view = IndexView(codes, self.bits, index.projection.query, index.projection.scale)
        return Job(kernels, view, query, n_old)

    def score(self, layer: int, query: Query, n_old: int) -> Tensor:
        """Score the first `n_old` records of a layer with its index."""
        index = self.index[layer]
        assert index.projection is not None
        codes = index.codes()[:, :, :n_old]
        self.count_index(layer, codes.numel() * codes.element_size())
        codes = unpack_codes(codes) if self.bits == 4 else codes
        projected = project_query(query.q, index.projection.query, index.projection.scale, query.scaling)
        return score_index(projected, codes, query.softcap)

    def select_records(self, layer: int, scores: Tensor, budget: Budget) -> Choice:
        """Apply the configured rule: the cap alone, alpha, the paper's mean count, or a share of mass."""
        config, cap, own = self.config, budget.early, budget.own_early
        valid, recent = self.find_open(layer, scores.shape[-1], budget)
        pool = pool_group if config.alpha is None else pool_group_by_best
        pooled = force_sinks(pool(scores, valid), budget.own_sinks, valid, recent)
        if self.fraction >= 1 or cap == 0 or (config.alpha is None and config.top_p is None):
            return self.pick(layer, pooled, budget)
        pooled = self.reach(layer, pooled)
        if config.top_p is not None:
            return select_mass(pooled, cap, config.top_p, own)
        assert config.alpha is not None
        return (select_mean_count if config.paper else select_within)(pooled, cap, config.alpha, own)

    def top_up(self, layer: int, query: Query, early: Fetch, budget: Budget) -> Choice | None:
        """Miss correction: score again with the true query, fetch the best of what speculation left out."""
        if budget.late == 0:
            return None
        n_old = self.store.length(layer) - budget.tail
        job = self._prepare_fast(layer, query, n_old)
        if job is not None and budget.own is None:
            return choose_alike(job, budget.late, 0, early.positions)
        if job is not None:
            starts = self.find_starts(self.store.length(layer))
            return choose_each(job, share_late(budget, starts, n_old), Choice(early.positions, early.valid))
        valid, _ = self.find_open(layer, n_old, budget)
        pooled, taken = pool_group(self.score(layer, query, n_old), valid), Choice(early.positions, early.valid)
        if valid is not None or self.reaches_disk(layer):
            # Of the disk a late read has to be waited for: as few pages as its share of the cap.
            return select_rest(self.reach(layer, pooled, self.share_late), taken, budget.late, budget.own_late)
        return select_top(forbid(pooled, taken), budget.late)


def share_beside_dense(fraction: float, n_layers: int, n_dense: int) -> float:
    """Return the fraction left to sparse layers where `n_dense` of `n_layers` read everything.

    Raises:
        ConfigError: the dense layers alone pass the cap.
    """
    if fraction >= 1:
        return 1.0
    share = (fraction * n_layers - n_dense) / max(1, n_layers - n_dense)
    if share <= 0:
        raise ConfigError(
            f"fraction: paper=True reads {n_dense} of {n_layers} layers whole, so the cap must be above "
            f"{n_dense / n_layers:.3f}, got {fraction}; raise it, or use paper=False"
        )
    return share
