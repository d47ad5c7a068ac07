"""Where the fast kernels stand in for the plain operations, and attention over the pool in its own memory.

In: a recipe's place and steps. Out: attention by a kernel that reads the chosen records where they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.kernels.native import Logits, Rows
from farkv.methods.contract import Kernel, Place, Query, Step
from farkv.methods.evicting import Evicting
from farkv.store.records import Stored


class Extent(NamedTuple):
    """How many rows there are, how many of the newest are read besides the chosen ones, and how they are stored."""

    n: int
    n_tail: int
    form: str = "plain"


class InPlace(Evicting):
    """The kernels of one recipe."""

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        super().__init__(place, fraction=fraction, sinks=sinks, window=window, top_up=top_up)
        self.fast = place.fast
        self.measuring = False

    def may_use_kernels(self, query: Query) -> bool:
        """Say whether the fast kernels know these queries: their dtype, and no gradients."""
        kernels = self.fast.kernels
        has_graph = query.q.requires_grad and torch.is_grad_enabled()
        return kernels is not None and kernels.can_read(query.q.dtype) and not has_graph

    def may_select(self, layer: int, query: Query) -> bool:
        """Say whether the fast kernels may choose: where tokens are padded, all padding must stand on the left."""
        if not self.may_use_kernels(query):
            return False
        if self.padding.real is None:
            return True
        if self.store.evicted[layer] or query.q.device.type != "cpu":
            return False
        lengths = self.padding.count(self.store.seen(layer))
        return lengths is not None and lengths.real == lengths.run

    def find_starts(self, n_tokens: int) -> list[int]:
        """Return where every sequence's own tokens begin."""
        lengths = self.padding.count(n_tokens)
        assert lengths is not None
        return [n_tokens - n for n in lengths.real]

    def may_attend(self, layer: int, step: Step) -> bool:
        """Say whether a kernel may attend: it knows the step, a choice is read, and nothing else looks on."""
        if self.share_of(layer) >= 1 and not self.fast.everywhere:
            # Everything was asked for: that is the model's own attention, bit for bit.
            return False
        watched = self.measuring or self.spiller is not None or step.mask is not None
        return not watched and self.padding.real is None and self.may_use_kernels(step.query)

    def reads_in_place(self, layer: int, step: Step) -> bool:
        """Say whether attention may read the pool where it lies, by a kernel."""
        return not self.store.travels and self.may_attend(layer, step)

    def read_in_place(
        self, layer: int, step: Step, kernel: Kernel, positions: Int[Tensor, "B Hkv K"] | None, n_tail: int
    ) -> object:
        """Attend to the records at `positions` (all without them) and the `n_tail` newest, in the pool's memory."""
        n, (batch, heads) = self.store.length(layer), self.store.heads(layer)
        self.count_read(layer, batch * heads * (n if positions is None else positions.shape[-1] + n_tail), step.k)
        self.note_read(layer, positions, None, n_tail)
        extent = Extent(n, n_tail, self._find_form(layer))
        return self._run_kernel(step, kernel, self.store.pool[layer].read(0, n), positions, extent)

    def read_near(self, layer: int, step: Step, kernel: Kernel, stored: Stored) -> object:
        """Attend to records that were brought near, coded ones as they are."""
        self.count_read(layer, stored.positions.numel(), step.k)
        self.note_read(layer, stored.positions, stored.valid)
        extent = Extent(stored.rows.shape[2], 0, self._find_form(layer))
        return self._run_kernel(step, kernel, stored.rows, None, extent)

    def note_read(
        self,
        layer: int,
        rows: Int[Tensor, "B Hkv K"] | None,
        valid: Bool[Tensor, "B Hkv K"] | None,
        n_tail: int = 0,
    ) -> None:
        """Tell the trace which rows of a layer (None: all) and how many of the newest besides a decode step reads."""
        trace, store = self.account.trace, self.store
        if trace is None:
            return
        n, heads = store.length(layer), store.heads(layer)
        device = store.device if rows is None else rows.device
        if rows is None or n_tail:
            tail = torch.arange(0 if rows is None else n - n_tail, n, device=device).expand(*heads, -1)
            rows = tail if rows is None else torch.cat([rows, tail], -1)
        trace.note(layer, store.locate(layer, rows), valid, store.seen(layer))

    def _find_form(self, layer: int) -> str:
        """Return how a layer's records are stored."""
        codec = self.store.codecs.get(layer)
        return "plain" if codec is None else codec.name

    def _run_kernel(self, step: Step, kernel: Kernel, rows: Tensor, positions: Tensor | None, extent: Extent) -> object:
        kernels, query = self.fast.kernels, step.query
        assert kernels is not None
        out = kernels.attend(
            query.q,
            Rows(rows, step.k.shape[-1], step.v.shape[-1], extent.form),
            Logits(query.scaling, query.softcap),
            positions=positions,
            n=extent.n,
            tail=extent.n_tail,
            sinks=kernel.sinks,
        )
        self.account.kernels.add(kernels.name)
        return kernel.wrap(out)
