"""How an attention logit is formed: scaling, softcap and sinks of one attention call.

In: products of queries and keys. Out: logits. Stateless.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Float, Tensor


class Logits(NamedTuple):
    """softmax over softcap(scaling * q . k), with softcap(x) = c tanh(x / c), or x where there is none.

    sinks: learned logits, one per query head, that only add to the softmax's denominator.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " Hq"] | None = None

    def cap(self, scaled: Tensor) -> Tensor:
        """Return softcap(scaled). Cost: a new tensor where there is a softcap, else none."""
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled

    def cap_(self, scaled: Tensor) -> Tensor:
        """Apply the softcap in place."""
        return scaled.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else scaled
