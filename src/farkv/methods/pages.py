"""Pages: per page of keys their bounds; at every step the pages that promise the largest logits are read (Quest).

The steps, in the paper's order (docs/papers/baselines.md has equation, function and deviation):
  as tokens come     bounds: per page and KV head the least and greatest key coordinates  (`math.bounds`)
  every layer, step  estimate: the largest logit that a page may hold, by the true query
                     select: the best pages, as many as the cap holds
                     attend

Bounds follow from the stored keys alone. Where they are lost (records were evicted, batches joined, a session loaded)
they are made anew from the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.config import MOST_WINDOW, check_counts, check_fraction
from farkv.errors import ConfigError
from farkv.math.bounds import bound_pages, mark_pages, rank_tokens, score_bounds
from farkv.math.score import pool_group
from farkv.math.step import Query, Step
from farkv.methods.base import Place, Records, Selector
from farkv.store.near.bounds import PageBounds
from farkv.store.sizes import LayerShape

# Capacities are multiples of so many tokens.
GROWTH_TOKENS = 64
# Keys whose bounds are made at once where they were stored before.
BLOCK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Attend to the pages whose key bounds promise the largest logit (Quest): chosen anew at every step.

    Args:
        fraction: hard cap on the KV bytes read per step.
        page: tokens of a page (Quest's: 16).
        sinks, window: first and recent tokens that are always read.
    """

    fraction: float = 0.1
    page: int = 16
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)
        check_counts(1, page=self.page)
        if self.page > MOST_WINDOW:
            raise ConfigError(f"page: expected at most {MOST_WINDOW} tokens, got {self.page}")


class PagesSelector(Selector):
    """Reads sinks, the window and the best pages by the true query."""

    def __init__(self, config: Any, place: Place):
        super().__init__(config, place)
        self.page: int = config.page
        reserve = place.reserve_tokens
        self.bounds = {i: PageBounds(place.ledger, place.device, reserve, config.page) for i in place.layers}
        self.followers = dict(self.bounds)

    # --- as tokens come -------------------------------------------------------------------------------------

    def observe(self, records: Records, step: Step) -> None:
        """Add new keys to the bounds. Coded ones wait until they are scored: their bounds are those of what is read."""
        if self.bounds[records.layer].length == records.length - step.n_new and not records.is_coded:
            self._add_keys(records, step.k)

    def prepare(self, records: Records, n_rows: int) -> None:
        """Bring a layer's bounds up to date, a block at a time: something was taken back, or is coded."""
        bounds = self.bounds[records.layer]
        # The newest token's key may not be here yet; it is read anyway.
        stop = records.length - 1
        while bounds.length < stop:
            end = min(bounds.length + BLOCK_TOKENS, stop)
            # A deliberate copy where the pool is far: these keys were stored before.
            self._add_keys(records, records.keys(bounds.length, end).to(self.place.device))

    def prepare_eviction(self, records: Records) -> None:
        """Nothing: what is left of the records stands on other pages, whose bounds are made anew."""

    def _add_keys(self, records: Records, keys: Float[Tensor, "B Hkv T D"]) -> None:
        """Add keys of the tokens that follow to a layer's bounds."""
        bounds, n_new = self.bounds[records.layer], keys.shape[2]
        valid = records.known(bounds.length + n_new)
        valid = None if valid is None else valid[..., bounds.length :]
        bounds.append(bound_pages(keys.detach(), valid, self.page, bounds.unfinished), n_new)

    # --- every layer, every step ----------------------------------------------------------------------------

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """1. The largest logit of every page.  2. Join the query group.  3. Tokens in the order of their pages."""
        best = score_bounds(query.q, self.bounds[records.layer].view(n_rows), query.logits)
        pooled = pool_group(best, None if visible is None else mark_pages(visible, self.page))
        return rank_tokens(pooled, self.page, n_rows)

    # --- bytes ----------------------------------------------------------------------------------------------

    def count_scored_bytes(self, records: Records, n_rows: int) -> int:
        """Return the bytes of the bounds of the first `n_rows` rows' pages."""
        bounds = self.bounds[records.layer].view(n_rows)
        return bounds.numel() * bounds.element_size()

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Return the bytes of one layer's bounds: whole pages, and the steps in which they grow."""
        grows = self.place.reserve_tokens < tokens
        n_pages = -(-(tokens + (GROWTH_TOKENS + 2 * self.page if grows else 0)) // self.page)
        return shape.batch * shape.kv_heads * n_pages * 2 * shape.k_dim * shape.itemsize
