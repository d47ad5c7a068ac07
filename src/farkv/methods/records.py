"""What a method gets from the engine: where it works, and what it may see of each layer's stored records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from farkv._axes import Bool, Tensor
from farkv.calibrate.profile import Profile
from farkv.store.ledger import Ledger
from farkv.store.sizes import LayerShape


class IndexerForm(NamedTuple):
    """The indexer that a model was trained with, the same in all its layers.

    dim: elements of one token's key.  budget: tokens that a query reads at most, in whole blocks.  block: tokens of a
    block; those behind the last whole one are read besides.
    """

    dim: int
    budget: int
    block: int

    @property
    def most(self) -> int:
        """Return the records per KV head that a step reads at most, the newest included, chosen or not."""
        return self.budget + max(1, self.block - 1)


class Place(NamedTuple):
    """Where a method works: its layers, their device, and the ledger that counts the bytes of an index.

    travels: records cross a link, so that choosing one layer ahead hides it.  reserve_tokens: the announced context.
    dense_tokens: up to here reading everything is faster than choosing on this machine.  indexer: the model's own.
    """

    layers: list[int]
    device: torch.device
    ledger: Ledger
    reserve_tokens: int = 0
    travels: bool = False
    dense_tokens: int = 0
    profile: Profile | None = None
    on_fallback: Callable[[str], None] = lambda name: None
    indexer: IndexerForm | None = None


@runtime_checkable
class Records(Protocol):
    """What a method may see of one layer's stored records. Rows are records in the order in which they are stored."""

    layer: int

    @property
    def shape(self) -> LayerShape:
        """Return the sequences, KV heads, dimensions and item size of the layer's records."""
        ...

    @property
    def length(self) -> int:
        """Return the rows stored."""
        ...

    @property
    def seen(self) -> int:
        """Return the tokens the layer was given, evicted ones included."""
        ...

    @property
    def is_coded(self) -> bool:
        """Say whether records are stored in fewer bits than the model made them."""
        ...

    @property
    def lies_open(self) -> bool:
        """Say whether keys and values can be read one by one in memory, as the model made them."""
        ...

    @property
    def evicted(self) -> int:
        """Return the tokens of which there is no row any more."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of an announced prompt; 0: any pass of more than one token may be its end."""
        ...

    def keys(self, start: int, stop: int) -> Tensor:
        """Return keys, [B, Hkv, stop - start, Dk], where they are stored: in place where that can be read."""
        ...

    def key_blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Give keys block by block where they cannot be read in place, else all at once."""
        ...

    def near_blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Give keys near, block by block, each with its first row: no more than a dense read takes at once."""
        ...

    def values(self) -> Tensor:
        """Return all values, [B, Hkv, S, Dv], where they are stored."""
        ...

    def visible(self, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of the first `n_rows` rows the running pass sees; None where it sees all."""
        ...

    def known(self, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of the first `n_rows` rows are no padding; None where all are."""
        ...

    def count_real(self, n_rows: int) -> list[int]:
        """Return the tokens of every sequence among the first `n_rows` rows that are no padding."""
        ...

    def real_tokens(self, n_tokens: int) -> Bool[Tensor, "b S"] | None:
        """Return which of the context's first `n_tokens` tokens are no padding; None where all are."""
        ...


def find_real(records: Records, n_rows: int) -> Bool[Tensor, "B S"] | None:
    """Return which of every sequence's first `n_rows` rows are no padding; None where all are."""
    known = records.known(n_rows)
    return None if known is None else known.all(1).expand(records.shape.batch, -1)
