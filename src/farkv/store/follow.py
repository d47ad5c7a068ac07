"""Followers of a layer's records: what is kept per row must be cropped, moved and freed with the rows.

A follower registers with the store (`FarStore.follow`), which calls it at every change of the records.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from farkv._axes import Int, Tensor


class Cropped(NamedTuple):
    """A layer after a crop: `length` rows are left, of `seen` tokens. Absolute numbers: a crop can be repeated."""

    length: int
    seen: int


@runtime_checkable
class Follower(Protocol):
    """State that is kept per row, or per sequence, of one layer."""

    def crop(self, now: Cropped) -> None:
        """Remove the state of all tokens but those that are left; do nothing where there is none."""
        ...

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep the state of the rows at these ascending positions; the others are evicted."""
        ...

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order, repeats allowed."""
        ...

    def clear(self) -> None:
        """Remove and free everything."""
        ...
