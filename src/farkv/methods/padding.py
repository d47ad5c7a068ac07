"""Which tokens of a batch are real: taken from the masks that go by, asked for by token or by stored row.

And what follows from it for every sequence: how much of a budget is its own, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.methods.contract import Budget, Own
from farkv.store.tiers import Tiers


class Lengths(NamedTuple):
    """Of every sequence: its real tokens, and how many of them are the newest columns without a gap."""

    real: list[int]
    run: list[int]


class Padding:
    """The last mask's view of the context; None, and no cost, where nothing is padded."""

    def __init__(self) -> None:
        self.real: Bool[Tensor, "b S"] | None = None
        self._lengths: dict[int, Lengths] = {}
        self._budgets: dict[tuple[float, ...], Budget] = {}

    def note(self, mask: Bool[Tensor, "b 1 T S"] | None) -> None:
        """Take the newest token's row of an attention mask."""
        if mask is None or (self.real is not None and self.real.shape == (mask.shape[0], mask.shape[3])):
            # None of this pass, or an earlier layer has brought it.
            return
        # A copy: the whole mask of a prompt would be held by its last row.
        real = mask[:, 0, -1].clone()
        # A deliberate sync, once per prompt chunk and layer: without padding no later step needs a mask.
        self.set(None if mask.shape[2] > 1 and bool(real.all()) else real)

    def set(self, real: Bool[Tensor, "b S"] | None) -> None:
        """Say which tokens are real."""
        self.real = real
        self._lengths.clear()
        self._budgets.clear()

    def of_tokens(self, n_tokens: int) -> Bool[Tensor, "b S"] | None:
        """Return which of the first `n_tokens` are real; tokens younger than the last mask are."""
        if self.real is None:
            return None
        known = self.real[:, :n_tokens]
        return torch.nn.functional.pad(known, (0, n_tokens - known.shape[1]), value=True)

    def of_rows(self, store: Tiers, layer: int, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of a layer's first `n_rows` stored records are real: one row for all heads, or one for each."""
        if not store.evicted[layer]:
            real = self.of_tokens(n_rows)
            return None if real is None else real[:, None]
        real = self.of_tokens(store.seen(layer))
        if real is None:
            return None
        batch, heads = store.heads(layer)
        rows = torch.arange(n_rows, device=real.device).expand(batch, heads, -1)
        return real[:, None].expand(batch, heads, -1).gather(-1, store.locate(layer, rows))

    # --- every sequence's own -------------------------------------------------------------------------------

    def count(self, n_tokens: int) -> Lengths | None:
        """Return the sequences' own lengths among the first `n_tokens`, None where nothing is padded."""
        real = self.of_tokens(n_tokens)
        if real is None:
            return None
        if n_tokens not in self._lengths:
            run = real.flip(-1).long().cumprod(-1).sum(-1)
            # A deliberate sync, once per pass over a padded batch: sizes of tensors follow from these numbers.
            self._lengths[n_tokens] = Lengths(*torch.stack([real.sum(-1), run]).tolist())
        return self._lengths[n_tokens]

    def share(self, key: tuple[float, ...], tokens: int, split: Callable[[int, int], Budget]) -> Budget:
        """Split a budget by each sequence's own length; it is remembered under `key` until the context changes.

        Args:
            split: the budget of a sequence with so many real tokens and so much padding.
        """
        lengths = self.count(tokens)
        assert lengths is not None
        assert self.real is not None
        if (tokens, *key) not in self._budgets:
            budgets = [split(max(1, n), tokens - max(1, n)) for n in lengths.real]
            self._budgets[tokens, *key] = join_budgets(budgets, lengths.run, self.real.device)
        return self._budgets[tokens, *key]

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`."""
        if self.real is not None:
            self.set(self.real[:, :n_tokens])

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.real is not None:
            real = self.real if self.real.shape[0] > 1 else self.real.expand(int(sequences.max()) + 1, -1)
            self.set(real.index_select(0, sequences.to(self.real.device)))


def join_budgets(budgets: list[Budget], runs: list[int], device: torch.device) -> Budget:
    """Return the sizes that hold every sequence's budget, and what of them is each one's own.

    The tail is read from all sequences alike: it is the smallest, and has no padding; what a sequence's window has
    beyond it is read early.

    Args:
        runs: of each sequence, the newest columns that are real without a gap.
    """
    tail = max(1, min(min(b.tail, run) for b, run in zip(budgets, runs, strict=True)))
    recent = [b.tail - tail for b in budgets]
    early = [b.early + n for b, n in zip(budgets, recent, strict=True)]
    late, sinks = [b.late for b in budgets], [b.sinks for b in budgets]
    own = torch.tensor([sinks, early, late, recent], device=device)[:, :, None, None]
    return Budget(max(sinks), max(early), max(late), tail, Own(own[0], own[1], own[2], own[3] if any(recent) else None))
