"""What leaves a layer: at the end of a prompt, while decoding, and where the pool is full. And which rows are real.

In: a recipe's levers and the steps that go by. Out: fewer records, in the store and in what follows it.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.methods.contract import Place, Step
from farkv.methods.limited import Limited
from farkv.methods.padding import Padding


class Evicting(Limited):
    """The levers of one recipe, and its pool's policy, at work."""

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        super().__init__(place, fraction=fraction, sinks=sinks, window=window, top_up=top_up)
        self.padding = Padding()

    def visible(self, layer: int, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of a layer's first `n_rows` stored records are real, None where all are."""
        return self.padding.of_rows(self.store, layer, n_rows)

    def forget(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Follow an eviction: only the records at these positions stay."""

    # --- the levers -----------------------------------------------------------------------------------------

    def _pull_levers(self, layer: int, step: Step) -> None:
        """At the end of the prompt evict and hold near; later evict where the next token would find no room."""
        keeper, seen = self.keeper, self.store.seen(layer)
        if step.k.shape[2] > 1 or seen <= self.prompt_tokens:
            if seen < self.prompt_tokens:
                return
            ready = (
                [layer] if keeper is None else keeper.end_prompt(layer, self.visible(layer, self.store.length(layer)))
            )
            for i in ready:
                self._evict(i, room=0 if keeper is None else keeper.room(i))
                if self.holder is not None:
                    self.holder.end_prompt(i, self.visible(i, self.store.length(i)))
        elif keeper is not None and keeper.is_over(layer):
            keeper.mark(layer, self.visible(layer, self.store.length(layer)))
            self._evict(layer, room=keeper.slack(layer))

    def _evict(self, layer: int, room: int) -> None:
        """Drop the least of what was scored just now."""
        if self.keeper is None:
            return
        # What is freed is what no later step will need.
        final = max(self.store.seen(layer), self.store.limits.reserve_tokens)
        self.store.reserve({layer: self.keeper.count(layer, final)})
        kept = self.keeper.choose_stored(layer, self.visible(layer, self.store.length(layer)), room)
        if kept is not None:
            self.forget(layer, kept.positions)
            self.store.evict(layer, kept)

    # --- a full pool ----------------------------------------------------------------------------------------

    def _make_room(self, layer: int, step: Step) -> None:
        """Let the prompt's last queries say what is used; evict where the next token has no room."""
        assert self.spiller is not None
        decodes = step.k.shape[2] == 1
        if not decodes or self.reads_all(layer):
            self._vote(layer, step)
        # Not of this pass's own tokens: should a later layer fail, all of them can still be taken back.
        self._spill(layer, self.spiller.count_excess(layer, 1, spare=decodes), newest=step.k.shape[2])

    def _vote(self, layer: int, step: Step) -> None:
        """Mark what the last queries would read, each sequence within its own cap."""
        assert self.spiller is not None
        seen, own = self.store.seen(layer), None
        lengths = self.padding.count(seen)
        if lengths is not None:
            caps = [self.count_cap(max(1, n), layer, seen - max(1, n)) for n in lengths.real]
            own = torch.tensor(caps, device=step.k.device)[:, None, None]
        self.spiller.vote(layer, step.query, self.count_cap(seen, layer), own, self.padding)

    def _spill(self, layer: int, n: int, newest: int = 0) -> None:
        """Evict `n` records of every KV head by the pool's policy, from the index and the pool together.

        Args:
            newest: records that stay besides those that always do, where others are enough.
        """
        if n > 0:
            assert self.spiller is not None
            kept = self.spiller.choose_kept(layer, n, self.visible(layer, self.store.length(layer)), newest)
            self.forget(layer, kept.positions)
            self.store.evict(layer, kept)
