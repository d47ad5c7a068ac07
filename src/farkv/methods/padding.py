"""Which tokens of a batch are real: taken from the masks that go by, asked for by token or by stored row."""

from __future__ import annotations

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.tiers import Tiers


class Padding:
    """The last mask's view of the context; None, and no cost, where nothing is padded."""

    def __init__(self) -> None:
        self.real: Bool[Tensor, "B S"] | None = None

    def note(self, mask: Bool[Tensor, "b 1 T S"] | None) -> None:
        """Take the newest token's row of an attention mask."""
        if mask is None:
            return
        self.real = mask[:, 0, -1]
        if mask.shape[2] > 1 and bool(self.real.all()):
            # A deliberate sync, once per prompt chunk and layer: without padding no later step needs a mask.
            self.real = None

    def of_tokens(self, n_tokens: int) -> Bool[Tensor, "B S"] | None:
        """Return which of the first `n_tokens` are real; tokens younger than the last mask are."""
        if self.real is None:
            return None
        known = self.real[:, :n_tokens]
        return torch.nn.functional.pad(known, (0, n_tokens - known.shape[1]), value=True)

    def of_rows(self, store: Tiers, layer: int, n_rows: int) -> Bool[Tensor, "B h S"] | None:
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

    def crop(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`."""
        if self.real is not None:
            self.real = self.real[:, :n_tokens]

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.real is not None:
            real = self.real if self.real.shape[0] > 1 else self.real.expand(int(sequences.max()) + 1, -1)
            self.real = real.index_select(0, sequences.to(self.real.device))
