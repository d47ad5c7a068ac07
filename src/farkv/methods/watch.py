"""What is known of every layer's recent queries, for the levers that score records by them.

In: each pass's queries. Out: a score per record. Holds a few queries per layer, no matter how long the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

from farkv._axes import Bool, Tensor
from farkv.config import XKV
from farkv.math.importance import Form, Observed, observe_queries, score_records
from farkv.methods.contract import Query


class Watcher:
    """The last queries of every layer."""

    def __init__(self, config: XKV):
        self.config = config
        self.observed: dict[int, Observed] = {}
        self.forms: dict[int, Form] = {}

    def watch(self, layer: int, query: Query, valid: Bool[Tensor, "B S"] | None) -> None:
        """Slide the layer's window of queries."""
        config = self.config
        seen = None if valid is None else valid[:, -query.q.shape[2] :].expand(query.q.shape[0], -1)
        self.observed[layer] = observe_queries(
            query.q, config.window, config.scorer, self.observed.get(layer), valid=seen
        )
        self.forms[layer] = Form(query.scaling, query.softcap)

    def score(
        self, layer: int, k: Tensor, v: Tensor, visible: Bool[Tensor, "B h S"] | None, most: int | None = None
    ) -> Tensor:
        """Score records where they are, all but the window's.

        Args:
            most: look with no more than so many of the window's queries, the latest.
        """
        # A deliberate copy where records are in host memory: a few queries go to them, not they near.
        observed = map_tensors(self.observed[layer], lambda t: t.to(k.device))
        if most is not None:
            observed = observed._replace(window=observed.window[:, :, -most:])
        return score_records(self.config.scorer, observed, k, v, visible, self.forms[layer], pool=self.config.pool)

    def select(self, sequences: Tensor, layer: int) -> None:
        """Keep these sequences' queries."""
        old = self.observed.get(layer)
        if old is not None:
            at = sequences.to(old.window.device)
            self.observed[layer] = map_tensors(old, lambda t: t.index_select(0, at))

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest queries of a layer: the next ones slide in behind those that are left."""
        old = self.observed.get(layer)
        if old is not None:
            self.observed[layer] = old._replace(window=old.window[:, :, : max(0, old.window.shape[2] - n_tokens)])

    def clear(self, layer: int) -> None:
        """Forget a layer's queries."""
        self.observed.pop(layer, None)


def map_tensors(observed: Observed, change: Callable[[Tensor], Tensor]) -> Observed:
    """Change every tensor that is there."""
    mean, covariance = observed.mean, observed.covariance
    return Observed(
        change(observed.window),
        None if mean is None else change(mean),
        None if covariance is None else change(covariance),
    )
