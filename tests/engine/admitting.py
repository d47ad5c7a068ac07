"""A store with its admission, and no model: a pass is a shape and a number of tokens."""

from __future__ import annotations

from typing import Any

from farkv.engine.admit import Admission
from farkv.engine.budget import Budgets
from farkv.engine.bytes_near import plan_near
from farkv.engine.bytes_need import ByteLimits, Need
from farkv.engine.mode import Mode
from farkv.engine.padding import Padding
from farkv.methods.base import Cap, Place, Selector
from farkv.methods.oracle import Oracle
from farkv.store.sizes import LayerShape, NearNeed
from farkv.store.tiers import Store


class Sized(Selector):
    """A method of which only the bytes are known: so many of an index per token, layer and KV head."""

    index_token_bytes = 0

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        return shape.batch * shape.kv_heads * self.index_token_bytes * tokens


class Gate(Admission):
    """The admission of a store whose steps read at most `most` records of every KV head.

    Args:
        spare: near bytes per sequence that a test takes besides.
    """

    def __init__(self, store: Store, most: int, *, index_token_bytes: int = 0, spare: int = 0):
        place = Place(list(store.order), store.device, store.index, store.limits.reserve_tokens)
        selector = Sized(Oracle(fraction=1e-9), place)
        selector.index_token_bytes, self.spare = index_token_bytes, spare
        budgets = Budgets(Cap(1e-9, least=most), None, store, Padding())
        super().__init__(selector, budgets, Mode(), shares=None, pins=None, policy=None, verifies=False)

    def _count_need(self, shape: LayerShape, *numbers: Any) -> Need:
        need = super()._count_need(shape, *numbers)
        return need._replace(pinned_bytes=lambda n: self.spare * shape.batch) if self.spare else need

    def count(self, shape: LayerShape, tokens: int) -> tuple[Need, ByteLimits]:
        """Return what a decode step of a context of so many tokens needs, and what is allowed."""
        return self.count_join(shape, tokens)

    def count_near(self, shape: LayerShape, tokens: int) -> NearNeed:
        """Return its near bytes."""
        need, limits = self.count(shape, tokens)
        return plan_near(need, limits, tokens).need
