"""What turns keys into an index: a projection that is fitted, and codes. A method that scores an index has one."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.kernels.native import load_native
from farkv.math.index import project_keys
from farkv.math.step import Query
from farkv.math.tables import decode_nibbles, encode_nibbles, learn_tables
from farkv.store.near.index import Projection


class IndexSize(NamedTuple):
    """The sizes of one key's entry in an index.

    columns: of a projected key.  nibbles: that code it, 0 where columns are stored as they are.  width: columns that a
    nibble is of.
    """

    columns: int
    nibbles: int
    width: int

    def count_bytes(self, itemsize: int) -> int:
        """Return the bytes of one key's entry, of records with numbers of `itemsize` bytes."""
        return self.nibbles // 2 if self.nibbles else self.columns * itemsize


@runtime_checkable
class Coder(Protocol):
    """How one method's index is made. Keeps nothing of a prompt."""

    # The fit needs the prompt's queries, times the softmax scaling if `takes_logits`; a skew of the prompt replaces
    # one that a profile would have; the fit is final at once; it is made anew when the text has drifted away from it.
    needs_queries: bool
    takes_logits: bool
    fits_skew: bool
    is_settled: bool
    drifts: bool

    def measure(self, k_dim: int, record_bytes: int) -> IndexSize:
        """Return the sizes of one key's entry."""
        ...

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        size: IndexSize,
    ) -> Projection:
        """Fit a layer's projection to samples of a prompt's queries and keys; `valid` is False on padding."""
        ...

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return keys as the index holds them, [B, Hkv, T, bytes]."""
        ...

    def decode(self, codes: Tensor, projection: Projection) -> Float[Tensor, "B Hkv S R"]:
        """Return projected keys as the index tells them."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        ...


def take_queries(coder: Coder, query: Query) -> Float[Tensor, "B Hq T D"]:
    """Return queries as a coder's fit wants them. Cost: a copy of them, where it wants them scaled."""
    return query.q * query.logits.scaling if coder.takes_logits else query.q


class Nibbles:
    """Codes by nibble tables, on one device: by the native kernels where they are, else by plain operations."""

    def __init__(self, device: torch.device):
        self.native = load_native() if device.type == "cpu" else None

    def learn(
        self, keys: Float32[Tensor, "B Hkv N R"], weights: Float32[Tensor, "B Hkv N"], size: IndexSize
    ) -> Float32[Tensor, "B Hkv Y W"]:
        """Return tables that leave little of the weighted keys."""
        learn = learn_tables if self.native is None else self.native.learn_tables
        return learn(keys, weights, size.nibbles, size.width)

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return the codes of keys."""
        encode = encode_nibbles if self.native is None else self.native.encode_nibbles
        return encode(project_keys(keys, projection.key, projection.mean), projection.tables)

    def decode(self, codes: Tensor, projection: Projection) -> Tensor:
        """Return projected keys as their codes tell them. Cost: plain operations, float32 of every column."""
        return decode_nibbles(codes, projection.tables, projection.key.shape[-1])
