"""What every layer stores of one token, as the model shows it. In: a decoder. Out: shapes, exact for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from farkv.hf.latents import LatentForm
from farkv.store.sizes import LayerShape


class Shapes(NamedTuple):
    """What managed layers store of a token; the layers that are left to Hugging Face, with one token in them."""

    managed: dict[int, LayerShape]
    dtypes: dict[int, torch.dtype]
    unmanaged: dict[int, Any]

    @property
    def widest(self) -> tuple[LayerShape, torch.dtype]:
        """Return the managed layer that takes most bytes."""
        layer = max(self.managed, key=lambda i: self.managed[i].token_bytes)
        return self.managed[layer], self.dtypes[layer]


@torch.no_grad()
def measure_shapes(
    decoder: nn.Module, config: Any, managed: list[int], device: torch.device, latents: dict[int, LatentForm]
) -> Shapes:
    """Send one token through a decoder and look at what its layers hold.

    Args:
        latents: the forms of those that store latents.
    """
    probe = DynamicCache(config=config)
    decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=probe)
    layers: list[Any] = probe.layers
    shapes: dict[int, LayerShape] = {}
    for i in managed:
        k, v = layers[i].keys, layers[i].values
        shapes[i] = LayerShape.of(*(latents[i].pack(k, v) if i in latents else (k, v)))
    others = {i: layer for i, layer in enumerate(layers) if i not in managed}
    return Shapes(shapes, {i: layers[i].keys.dtype for i in managed}, others)
