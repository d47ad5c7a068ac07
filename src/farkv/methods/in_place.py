"""Where the fast kernels stand in for the plain operations, and attention over the pool in its own memory.

In: a recipe's place and steps. Out: attention by a kernel that reads the chosen records where they lie.
"""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor
from farkv.kernels.native import Logits, Rows
from farkv.methods.contract import Kernel, Place, Query, Step
from farkv.methods.evicting import Evicting


class InPlace(Evicting):
    """The kernels of one recipe."""

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        super().__init__(place, fraction=fraction, sinks=sinks, window=window, top_up=top_up)
        self.fast = place.fast
        self.measuring = False

    def may_use_kernels(self, query: Query) -> bool:
        """Say whether the fast kernels know this step: no padding, records that they can read, no gradients."""
        kernels = self.fast.kernels
        return (
            kernels is not None
            and self.padding.real is None
            and kernels.can_read(query.q.dtype)
            and not (query.q.requires_grad and torch.is_grad_enabled())
        )

    def reads_in_place(self, step: Step) -> bool:
        """Say whether attention may read the pool where it lies, by a kernel, with nothing else looking on."""
        plain = self.store.far or self.measuring or self.spiller is not None or step.mask is not None
        return not plain and self.may_use_kernels(step.query)

    def read_in_place(
        self, layer: int, step: Step, kernel: Kernel, positions: Int[Tensor, "B Hkv K"] | None, n_tail: int
    ) -> object:
        """Attend to the records at `positions` (all without them) and the `n_tail` newest, in the pool's memory."""
        assert self.fast.kernels is not None
        query, n = step.query, self.store.length(layer)
        batch, heads = self.store.heads(layer)
        self.count_read(layer, batch * heads * (n if positions is None else positions.shape[-1] + n_tail), step.k)
        rows = Rows(self.store.rows(layer), step.k.shape[-1], step.v.shape[-1])
        logits = Logits(query.scaling, query.softcap)
        out = self.fast.kernels.attend(query.q, rows, logits, positions=positions, n=n, tail=n_tail, sinks=kernel.sinks)
        self.account.kernels.add(self.fast.kernels.name)
        return kernel.wrap(out)
