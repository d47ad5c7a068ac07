"""The near lever: which records of each layer stay near, so that a selector's fetches need not bring them.

Nothing is lost by a wrong choice: what is not held near is fetched. Chosen once, at the end of the prompt.
"""

from __future__ import annotations

from farkv._axes import Bool, Tensor
from farkv.math.keep import choose_kept
from farkv.methods.watch import Watcher
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Tiers


class Holder:
    """Each layer's share of the context, held near."""

    def __init__(self, watcher: Watcher, shares: dict[int, float], store: Tiers):
        self.watcher, self.shares, self.store = watcher, shares, store

    def count_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Return the near bytes that all layers' shares of a context take."""
        return sum(int(share * tokens) for share in self.shares.values()) * shape.token_bytes

    def end_prompt(self, layer: int, visible: Bool[Tensor, "B h S"] | None) -> None:
        """1. Score the layer's records.  2. Hold the best of every head near."""
        k, v = self.store.records(layer)
        scores = self.watcher.score(layer, k, v, None if visible is None else visible.to(k.device))
        n = min(int(self.shares[layer] * self.store.seen(layer)), scores.shape[-1])
        if n > 0:
            self.store.hold_near(layer, choose_kept(scores, scores.shape[-1], n, 0)[0])
