"""What turns keys into an index: a projection that is fitted, and codes. A method that scores an index has one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from farkv._axes import Bool, Float, Tensor
from farkv.store.near.index import Projection


@runtime_checkable
class Coder(Protocol):
    """How one method's index is made. Keeps nothing of a prompt."""

    # Of one column of one key; 0: columns are not rounded.
    bits: int
    # The fit needs the prompt's queries; it is a skew of this prompt; it is final at once; it is made anew
    # when the text has drifted away from it.
    needs_queries: bool
    fits_skew: bool
    is_settled: bool
    drifts: bool

    def count_columns(self, k_dim: int, record_bytes: int) -> int:
        """Return the index columns R."""
        ...

    def fit(
        self,
        layer: int,
        queries: Float[Tensor, "B Hq M D"] | None,
        keys: Float[Tensor, "B Hkv N D"],
        valid: Bool[Tensor, "B N"] | None,
        n_columns: int,
    ) -> Projection:
        """Fit a layer's projection to samples of a prompt's queries and keys; `valid` is False on padding."""
        ...

    def encode(self, keys: Float[Tensor, "B Hkv T D"], projection: Projection) -> Tensor:
        """Return keys as the index holds them, [B, Hkv, T, bytes]."""
        ...

    def unpack(self, codes: Tensor) -> Tensor:
        """Return codes with one column each, [B, Hkv, S, R]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved index to be of use."""
        ...
