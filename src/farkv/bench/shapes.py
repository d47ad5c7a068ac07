"""Shapes of real models' layers, without their weights. Pure arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from farkv.errors import ConfigError

Family = Literal["llama", "qwen3", "opt"]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a model that determine the bytes and operations of a decode step.

    Args:
        family: the architecture that implements it where a whole model of random weights is measured.
    """

    name: str
    family: Family | None
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @property
    def scaling(self) -> float:
        """Return the factor applied to the logits."""
        return self.head_dim**-0.5

    def record_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of K and V of one token and KV head."""
        return 2 * self.head_dim * itemsize

    def layer_bytes(self, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
        """Return the KV bytes of one layer."""
        return batch * self.kv_heads * tokens * self.record_bytes(itemsize)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama3-8b", "llama", 32, 4096, 32, 8, 128, 14336),
        ModelShape("llama3.2-1b", "llama", 16, 2048, 32, 8, 64, 8192),
        ModelShape("qwen3-8b", "qwen3", 36, 4096, 32, 8, 128, 12288),
        ModelShape("opt-6.7b", "opt", 32, 4096, 32, 32, 128, 16384),
    )
}


def find_shape(name: str) -> ModelShape:
    """Return the shape with this name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]


def parse_contexts(text: str, option: str = "--contexts") -> list[int]:
    """Parse `8192,32K` into token counts of at most 12 digits, ascending and without duplicates; K is 1024.

    Raises:
        ConfigError: an item is not a number of at least 64 tokens.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,12})\s*([Kk]?)\s*", part)
        tokens = 0 if match is None else int(match[1]) * (1024 if match[2] else 1)
        if tokens < 64:
            raise ConfigError(f"{option}: expected numbers of at least 64 tokens, for example 8K,32K; got {part!r}")
        found.append(tokens)
    return sorted(set(found))


def format_tokens(tokens: int) -> str:
    """Format a token count for display: `32 K`, or `1000`."""
    return f"{tokens // 1024} K" if tokens % 1024 == 0 else str(tokens)
