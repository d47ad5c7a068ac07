"""Which tokens of a batch are real: taken from the masks that go by, asked for by token or by stored row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.follow import Cropped
from farkv.store.tiers import Store


class Lengths(NamedTuple):
    """Of every sequence: its real tokens, and how many of them are the newest columns without a gap."""

    real: list[int]
    run: list[int]


class Padding:
    """The last mask's view of the context; None, and no cost, where nothing is padded. It follows the first layer."""

    def __init__(self) -> None:
        self.real: Bool[Tensor, "b S"] | None = None
        # Counts the changes of `real`: what was derived from an older one is no longer true.
        self.version = 0
        self._lengths: dict[int, Lengths] = {}

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
        self.version += 1
        self._lengths.clear()
        self.real = real

    def of_tokens(self, n_tokens: int) -> Bool[Tensor, "b S"] | None:
        """Return which of the first `n_tokens` are real; tokens younger than the last mask are."""
        if self.real is None:
            return None
        known = self.real[:, :n_tokens]
        return torch.nn.functional.pad(known, (0, n_tokens - known.shape[1]), value=True)

    def of_rows(self, store: Store, layer: int, n_rows: int) -> Bool[Tensor, "b h S"] | None:
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

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, now: Cropped) -> None:
        """Forget all but the tokens that are left."""
        if self.real is not None:
            self.set(self.real[:, : now.seen])

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Nothing: padding is known by token, evicted or not."""

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.real is not None:
            real = self.real if self.real.shape[0] > 1 else self.real.expand(int(sequences.max()) + 1, -1)
            self.set(real.index_select(0, sequences.to(self.real.device)))

    def clear(self) -> None:
        """Forget everything."""
        self.set(None)
