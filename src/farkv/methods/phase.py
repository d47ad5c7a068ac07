"""The state of one layer's index apart from its codes.

In: what passes found. Out: a `Phase`, immutable: a pass that is taken back puts back the one it found.
"""

from __future__ import annotations

from typing import NamedTuple

from farkv._axes import Int, Tensor
from farkv.methods.watch import Watch, select_watch


class Phase(NamedTuple):
    """The state of a layer's index apart from its codes; immutable, replaced by every pass.

    samples, strides: queries of every sequence, one of `strides` tokens each.  fitted: tokens that each sequence's
    projection was fitted to; None: nothing was.  grown: since the layer was last scored, passes of several tokens have
    added records, or as many tokens that drift is to be looked for; its rows then, 0: neither.  unscored: the first
    pass was fitted to as if it were the whole prompt, and may not have been.  watch: what is known of drift.
    """

    samples: Tensor | None = None
    strides: list[int] | None = None
    fitted: list[int] | None = None
    grown: int = 0
    unscored: bool = False
    watch: Watch = Watch()

    def select(self, order: list[int], sequences: Int[Tensor, " N"]) -> Phase:
        """Return the phase of these sequences of the batch, in this order: as numbers, and as a tensor."""
        samples, strides, fitted = self[:3]
        return self._replace(
            samples=None if samples is None else samples.index_select(0, sequences.to(samples.device)),
            strides=None if strides is None else [strides[i] for i in order],
            fitted=None if fitted is None else [fitted[i] for i in order],
            watch=select_watch(self.watch, order, sequences),
        )
