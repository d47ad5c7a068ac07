"""Which page is in which slot of a page cache, both ways, and what a replacement policy knows of each.

In: page numbers, slots. Out: slots, page numbers, victims. Knows no bytes and reads nothing.
"""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.store.far.eviction import Policy, Uses


class PageSlots:
    """The tables of a page cache; slots `used` and beyond are in nobody's use."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.used = self.now = 0
        # The slot of every page, -1 without one; the page of every slot.
        self.slot_of = torch.empty(0, dtype=torch.int32)
        self.page_of = torch.empty(0, dtype=torch.int64)
        self.births = torch.empty(0, dtype=torch.int32)
        self.uses: Uses | None = None

    def know(self, n_pages: int) -> None:
        """Make the table of pages as long as there are pages."""
        if n_pages > len(self.slot_of):
            grown = torch.full((n_pages * 5 // 4 + 64,), -1, dtype=torch.int32)
            grown[: len(self.slot_of)] = self.slot_of
            self.slot_of = grown

    def grow(self, n: int) -> None:
        """Make the tables of slots `n` long."""
        page_of = torch.full((n,), -1, dtype=torch.int64)
        births = torch.zeros(n, dtype=torch.int32)
        page_of[: self.used], births[: self.used] = self.page_of[: self.used], self.births[: self.used]
        uses = self.policy.start((n,), self.now, torch.device("cpu"))
        if self.uses is not None:
            uses.values[: self.used] = self.uses.values[: self.used]
            uses.hand.copy_(self.uses.hand)
        self.page_of, self.births, self.uses = page_of, births, uses

    def take_victims(self, n: int, closed: Bool[Tensor, " S"]) -> Int[Tensor, " n"]:
        """Return `n` slots that hold no page any more; none that is closed."""
        assert self.uses is not None
        victims = self.policy.choose(self.uses, self.births, n, closed, None)
        self._unname(self.page_of[victims])
        return victims

    def _unname(self, pages: Tensor) -> None:
        """Note that pages are in no slot; a slot that is yet unnamed has page -1."""
        self.slot_of[pages[pages >= 0]] = -1

    def drop(self, left: int) -> None:
        """Note that slots `left` and beyond hold nothing."""
        self._unname(self.page_of[left : self.used])
        self.page_of[left:] = -1
        self.used = left

    def name(self, pages: Int[Tensor, " N"], slots: Int[Tensor, " N"]) -> None:
        """Note which pages slots hold now."""
        if len(slots):
            assert self.uses is not None
            self.page_of[slots] = pages
            self.slot_of[pages] = slots.int()
            self.births[slots] = self.now
            self.policy.renew(self.uses, slots, self.now)

    def touch(self, slots: Int[Tensor, " N"], weights: Float[Tensor, " N"]) -> None:
        """Note that pages in these slots, each once, are read, and how much of each."""
        if len(slots):
            assert self.uses is not None
            self.policy.touch(self.uses, slots, None, self.now, weights)
