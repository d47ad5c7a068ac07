"""Where fast kernels replace the plain operations: whether they support a step, and attention by them.

In: steps, records. Out: attention output, equal to the model's own to rounding; or that they do not support it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.account import Account
from farkv.engine.padding import Padding
from farkv.engine.setup import Kernels
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import IndexView, Native, Rows
from farkv.math.step import AttentionFunction, Query, Step
from farkv.methods.base import Selector
from farkv.store.tiers import Store


class Reads(NamedTuple):
    """What a kernel attends to: the first `n` of these rows, or those at `positions` and the `n_newest` newest.

    counts: how many of each head's positions; None: all.  odds: added to the logits at positions; None: nothing.
    """

    rows: Tensor
    n: int
    positions: Int[Tensor, "B Hkv K"] | None = None
    n_newest: int = 0
    counts: Int[Tensor, "B Hkv"] | None = None
    odds: Float32[Tensor, "B Hkv K"] | None = None


class FastPath:
    """The fast kernels of one cache."""

    def __init__(self, kernels: Kernels, store: Store, padding: Padding, account: Account):
        self.kernels, self.everywhere = kernels.fast, kernels.everywhere
        self.store, self.padding, self.account = store, padding, account

    def knows(self, query: Query) -> bool:
        """Say whether the kernels can read these queries: their dtype, and no gradients."""
        if self.kernels is None or (query.q.requires_grad and torch.is_grad_enabled()):
            return False
        return self.kernels.can_read(query.q.dtype)

    def may_attend(self, step: Step) -> bool:
        """Return whether a kernel may attend: it supports the queries, and all sequences read the same number.

        None reads latents: the model's own attention reads what they expand to.
        """
        return not step.in_keys and step.mask is None and self.padding.real is None and self.knows(step.query)

    def find_view(self, layer: int, query: Query, selector: Selector) -> IndexView | None:
        """Return the index that a kernel may choose from, None where it may not.

        Where tokens are padded, all padding must stand on the left, of a layer that is whole.
        """
        if not self.knows(query):
            return None
        if self.padding.real is not None:
            if self.store.evicted[layer] or query.q.device.type != "cpu":
                return None
            lengths = self.padding.count(self.store.seen(layer))
            if lengths is None or lengths.real != lengths.run:
                return None
        return selector.view_index(layer)

    def use(self) -> Native | Gpu:
        """Return the kernels; the receipt names them from now on."""
        assert self.kernels is not None
        self.account.kernels.add(self.kernels.name)
        return self.kernels

    def attend(self, layer: int, step: Step, attention: AttentionFunction, reads: Reads) -> object:
        """Attend by a kernel, coded records as they are stored."""
        codec = self.store.codecs.get(layer)
        form = "plain" if codec is None else codec.name
        out = self.use().attend(
            step.query.q,
            Rows(reads.rows, step.k.shape[-1], step.v.shape[-1], form),
            step.query.logits,
            positions=reads.positions,
            n=reads.n,
            tail=reads.n_newest,
            sinks=attention.sinks,
            # The kernels of a GPU know neither.
            **({} if reads.counts is None else {"counts": reads.counts}),
            **({} if reads.odds is None else {"odds": reads.odds}),
        )
        return attention.wrap(out)
