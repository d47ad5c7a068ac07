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
    """Which tokens the running pass sees, and which any has seen: the others are padding. It follows the first layer.

    None, and no cost, where that is all of them. What a step may read follows from the first; what is fitted to a text,
    or scored along it, from the second: a mask of one pass is forgotten with it.
    """

    def __init__(self) -> None:
        self.real: Bool[Tensor, "b S"] | None = None
        self.ever: Bool[Tensor, "b S"] | None = None
        # Counts the changes of `real`: what was derived from an older one is no longer true.
        self.version = 0
        self._lengths: dict[tuple[bool, int], Lengths] = {}

    def note(self, mask: Bool[Tensor, "b 1 T S"] | None) -> None:
        """Take a pass's attention mask, as its newest token sees it; without one all tokens are seen."""
        if mask is None:
            if self.real is not None:
                self.set(None)
            return
        n_new = mask.shape[2]
        # A copy: the whole mask of a prompt would be held by its last row.
        real = mask[:, 0, -1].clone()
        if n_new == 1 and self.ever is None:
            self.set(real)
            return
        # What padding itself would see says nothing: Hugging Face lets it see anything.
        seen = (mask[:, 0] & real[:, -n_new:, None]).any(1)
        ever = pad_to(self.ever, mask.shape[3] - n_new, real) | seen
        # A deliberate sync, once per prompt chunk: without padding no later step needs a mask.
        if n_new > 1 and bool(torch.stack([real, ever]).all()):
            self.set(None)
        else:
            self.set(real, ever)

    def set(self, real: Bool[Tensor, "b S"] | None, ever: Bool[Tensor, "b S"] | None = None) -> None:
        """Say which tokens are seen now, and which ever were."""
        self.version += 1
        self._lengths.clear()
        self.real, self.ever = real, ever

    def of_tokens(self, n_tokens: int, *, ever: bool = False) -> Bool[Tensor, "b S"] | None:
        """Return which of the first `n_tokens` are seen, now or ever; tokens younger than the last mask are."""
        known = self.ever if ever else self.real
        if known is None:
            return None
        known = known[:, :n_tokens]
        return torch.nn.functional.pad(known, (0, n_tokens - known.shape[1]), value=True)

    def of_rows(self, store: Store, layer: int, n_rows: int, *, ever: bool = False) -> Bool[Tensor, "b h S"] | None:
        """Return which of a layer's first `n_rows` stored records are seen: one row for all heads, or one for each."""
        if not store.evicted[layer]:
            real = self.of_tokens(n_rows, ever=ever)
            return None if real is None else real[:, None]
        real = self.of_tokens(store.seen(layer), ever=ever)
        if real is None:
            return None
        batch, heads = store.heads(layer)
        rows = torch.arange(n_rows, device=real.device).expand(batch, heads, -1)
        return real[:, None].expand(batch, heads, -1).gather(-1, store.locate(layer, rows))

    def count(self, n_tokens: int, *, ever: bool = False) -> Lengths | None:
        """Return the sequences' own lengths among the first `n_tokens`, None where nothing is padded."""
        real = self.of_tokens(n_tokens, ever=ever)
        if real is None:
            return None
        if (ever, n_tokens) not in self._lengths:
            run = real.flip(-1).long().cumprod(-1).sum(-1)
            # A deliberate sync, once per pass over a padded batch: sizes of tensors follow from these numbers.
            self._lengths[ever, n_tokens] = Lengths(*torch.stack([real.sum(-1), run]).tolist())
        return self._lengths[ever, n_tokens]

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, now: Cropped) -> None:
        """Forget all but the tokens that are left."""
        if self.real is not None or self.ever is not None:
            self.set(*(None if part is None else part[:, : now.seen] for part in (self.real, self.ever)))

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Nothing: padding is known by token, evicted or not."""

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.real is not None or self.ever is not None:
            self.set(*(None if part is None else pick(part, sequences) for part in (self.real, self.ever)))

    def clear(self) -> None:
        """Forget everything."""
        self.set(None)


def pad_to(ever: Bool[Tensor, "b S"] | None, n_old: int, like: Bool[Tensor, "b N"]) -> Bool[Tensor, "B N"]:
    """Return which of N tokens were seen before a pass that brings the last of them, `n_old` being there."""
    old = torch.ones_like(like[:, :n_old]) if ever is None else ever[:, :n_old]
    # Tokens that came without a mask were seen.
    old = torch.nn.functional.pad(old, (0, n_old - old.shape[1]), value=True)
    return torch.nn.functional.pad(old, (0, like.shape[1] - n_old), value=False)


def pick(real: Bool[Tensor, "b S"], sequences: Int[Tensor, " N"]) -> Bool[Tensor, "N S"]:
    """Return the rows of some sequences; one row may stand for all."""
    real = real if real.shape[0] > 1 else real.expand(int(sequences.max()) + 1, -1)
    return real.index_select(0, sequences.to(real.device))
