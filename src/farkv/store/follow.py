"""What follows a layer's records: when rows go, move or are freed, whatever is kept per row must do the same.

A follower registers with the store (`FarStore.follow`); the store then calls it after every change of the records.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from farkv._axes import Int, Tensor


class Cropped(NamedTuple):
    """What a crop has left of a layer: it took the `n_tokens` newest; `length` rows, of `seen` tokens, stay."""

    n_tokens: int
    length: int
    seen: int


@runtime_checkable
class Follower(Protocol):
    """Something that is kept per row, or per sequence, of one layer."""

    def crop(self, now: Cropped) -> None:
        """Forget what belongs to the newest tokens."""
        ...

    def keep(self, positions: Int[Tensor, "B Hkv K"]) -> None:
        """Keep what belongs to the rows at these positions, ascending: the others were evicted."""
        ...

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order, repeats allowed."""
        ...

    def clear(self) -> None:
        """Forget and free everything."""
        ...
