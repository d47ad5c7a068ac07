"""Random records: the floor for every selector."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.config import check_counts, check_fraction, check_seed
from farkv.math.step import Query
from farkv.methods.base import Place, Records, Selector


@dataclass(frozen=True, kw_only=True)
class Random:
    """Attend to random records per KV head and step, besides sinks and window: the floor of every plot."""

    fraction: float = 0.1
    sinks: int = 4
    window: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_counts(sinks=self.sinks, window=self.window)
        check_seed(self.seed)


class RandomSelector(Selector):
    """Reads sinks, the window and random records, drawn anew per layer, KV head and step."""

    def __init__(self, config: Any, place: Place):
        super().__init__(config, place)
        self.generator = torch.Generator(place.device).manual_seed(config.seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomSelector:
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            setattr(other, name, value.clone_state() if name == "generator" else deepcopy(value, memo))
        return other

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """Draw a score for every record."""
        shape = records.shape
        return torch.rand(
            shape.batch, shape.kv_heads, n_rows, generator=self.generator, device=query.q.device, dtype=torch.float32
        )
