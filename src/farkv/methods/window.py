"""Sinks and the recent window: what the cheapest sparse attention reads (StreamingLLM's pattern).

Deviation: nothing is evicted and positions are the true ones, so only the choice differs from the other methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.config import check_counts, check_fraction
from farkv.math.step import Query
from farkv.methods.base import Place, Records, Selector


@dataclass(frozen=True, kw_only=True)
class Window:
    """Attend to the first `sinks` and the most recent records (StreamingLLM's pattern, nothing evicted)."""

    fraction: float = 0.1
    sinks: int = 4

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks)


class WindowSelector(Selector):
    """Reads the first `sinks` tokens, the rest of the cap from the end."""

    # The newest records are always chosen, so their pages are never skipped.
    limits_pages = False

    def __init__(self, config: Any, place: Place):
        super().__init__(config, place)
        self.cap = self.cap._replace(only_sinks=True)

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """The youngest score highest."""
        age = torch.arange(n_rows, device=query.q.device, dtype=torch.float32)
        return age.repeat(records.shape.batch, records.shape.kv_heads, 1)
