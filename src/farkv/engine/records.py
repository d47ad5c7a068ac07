"""One layer's stored records, as a method may see them: the engine's side of `methods.base.Records`."""

from __future__ import annotations

from collections.abc import Iterator

from farkv._axes import Bool, Tensor
from farkv.engine.mode import Mode
from farkv.engine.padding import Padding
from farkv.engine.setup import Latents
from farkv.store.placement import Placement
from farkv.store.sizes import LayerShape
from farkv.store.tiers import BLOCK_TOKENS, Store


class LayerRecords:
    """Rows of one layer and which of them are real; it holds neither.

    Args:
        latents: what the layer stores instead of keys and values, where it does.
    """

    def __init__(self, store: Store, padding: Padding, mode: Mode, layer: int, latents: Latents | None = None):
        self.store, self.padding, self.mode, self.layer = store, padding, mode, layer
        self.latents = latents or Latents()

    @property
    def shape(self) -> LayerShape:
        """Return the sequences, KV heads, dimensions and item size of the layer's records."""
        return self.store.shape(self.layer)

    @property
    def length(self) -> int:
        """Return the rows stored."""
        return self.store.pool[self.layer].length

    @property
    def seen(self) -> int:
        """Return the tokens the layer was given, evicted ones included."""
        return self.store.pool[self.layer].length + self.store.evicted[self.layer]

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of an announced prompt; 0: any pass of more than one token may be its end."""
        return self.mode.prompt_tokens

    @property
    def is_coded(self) -> bool:
        """Say whether records are stored in fewer bits than the model made them."""
        return self.layer in self.store.codecs

    @property
    def lies_open(self) -> bool:
        """Say whether keys and values can be read one by one in memory, as the model made them."""
        return not self.is_coded and self.store.placement is not Placement.DISK

    @property
    def evicted(self) -> int:
        """Return the tokens of which there is no row any more."""
        return self.store.evicted[self.layer]

    def keys(self, start: int, stop: int) -> Tensor:
        """Return keys, [B, Hkv, stop - start, Dk], where they are stored: in place where that can be read."""
        return self.store.keys(self.layer, start, stop)

    def key_blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Give keys block by block where they cannot be read in place, else all at once."""
        n = max(1, stop - start) if self.store.reads_in_place else BLOCK_TOKENS
        return (self.store.keys(self.layer, at, min(at + n, stop)) for at in range(start, stop, n))

    def near_blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Give keys near, block by block, each with its first row: no more than a dense read takes at once."""
        n = min(BLOCK_TOKENS, self.store.block_tokens)
        for first in range(start, stop, n):
            # A deliberate copy where the pool is far: these keys were stored before.
            yield first, self.store.keys(self.layer, first, min(first + n, stop)).to(self.store.device)

    def values(self) -> Tensor:
        """Return all values, [B, Hkv, S, Dv], where they are stored."""
        keys, values = self.store.records(self.layer)
        return keys[..., : self.latents.rank] if self.latents.rank else values

    def count_expanded(self, n_rows: int) -> int:
        """Return the bytes of what the model makes of `n_rows` rows of every head to read them; 0 where it does not."""
        return n_rows * self.shape.token_bytes * self.latents.expansion if self.latents.expansion else 0

    def visible(self, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of the first `n_rows` rows the running pass sees; None where all are."""
        return self.padding.of_rows(self.store, self.layer, n_rows)

    def known(self, n_rows: int) -> Bool[Tensor, "b h S"] | None:
        """Return which of the first `n_rows` rows are no padding; None where all are."""
        return self.padding.of_rows(self.store, self.layer, n_rows, ever=True)

    def count_real(self, n_rows: int) -> list[int]:
        """Return the tokens of every sequence among the first `n_rows` rows that are no padding."""
        lengths = self.padding.count(n_rows + self.store.evicted[self.layer], ever=True)
        own = [n_rows] if lengths is None else [min(n, n_rows) for n in lengths.real]
        return own if len(own) > 1 else own * self.store.batch(self.layer)

    def real_tokens(self, n_tokens: int) -> Bool[Tensor, "b S"] | None:
        """Return which of the context's first `n_tokens` tokens are no padding; None where all are."""
        return self.padding.of_tokens(n_tokens, ever=True)
