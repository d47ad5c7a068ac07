"""In what a cache of ours is unlike Hugging Face's: it holds no tensors to walk over, and is of this process alone.

In: what code tries that takes it for an ordinary cache. Out: a refusal in words, or a true copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

from farkv._axes import Tensor
from farkv.errors import CacheStateError


class Unlike:
    """What a cache of far records refuses, and how it is copied."""

    # The pass that runs, of which the cache is told by the hooks of an attached model alone.
    _pass: Any

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new tokens.

        Raises:
            CacheStateError: no pass of an attached model runs.
        """
        self._check_runs()
        cache: Any = super()
        return cache.update(*args, **kwargs)

    def update_indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Store the new keys of a layer's own indexer; raises as `update`."""
        self._check_runs()
        cache: Any = super()
        return cache.update_indexer(*args, **kwargs)

    def _check_runs(self) -> None:
        if self._pass is None:
            raise CacheStateError(
                "this cache: expected a pass of the attached model that made it, got one of a model that is not; use "
                "it inside `with farkv.attach(model)`, or an ordinary cache"
            )

    def __iter__(self) -> Iterator[Any]:
        raise CacheStateError(
            "this cache: its records are in far memory, so there are no keys and values to walk over; use an ordinary "
            "cache where code reads a cache's tensors"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache of its own records."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheStateError(
            "this cache: it cannot be pickled; write what it has read to a file with cache.save(path), and read it "
            "with farkv.load_cache(path, model)"
        )
