"""The last queries of one layer, by which an evictor scores its records. They follow the layer."""

from __future__ import annotations

from collections.abc import Callable

from farkv._axes import Int, Tensor
from farkv.math.importance import Observed
from farkv.math.logits import Logits
from farkv.store.follow import Cropped


class LastQueries:
    """A summary of one layer's recent queries; it follows the layer."""

    def __init__(self) -> None:
        self.observed: Observed | None = None
        self.logits = Logits(1.0)
        # Tokens the layer had seen at the last update.
        self.seen = 0

    def note(self, observed: Observed, logits: Logits, seen: int) -> None:
        """Store the observed queries, their logit form, and the tokens seen so far."""
        self.observed, self.logits, self.seen = observed, logits, seen

    def crop(self, now: Cropped) -> None:
        """Forget the newest tokens' queries: the next ones slide in behind those that are left."""
        n = self.seen - now.seen
        if self.observed is not None and n > 0:
            window = self.observed.window
            # What is cut off was the last of a text: the moments stay, those of the next text begin anew.
            self.observed = self.observed._replace(window=window[:, :, : max(0, window.shape[2] - n)], latest=None)
            self.seen = now.seen

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Nothing: queries do not go with records."""

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences' queries."""
        if self.observed is not None:
            at = sequences.to(self.observed.window.device)
            self.observed = map_tensors(self.observed, lambda t: t.index_select(0, at))

    def clear(self) -> None:
        """Forget them."""
        self.observed, self.seen = None, 0


def map_tensors(observed: Observed, change: Callable[[Tensor], Tensor]) -> Observed:
    """Change every tensor that is there."""
    return Observed._make(None if tensor is None else change(tensor) for tensor in observed)
