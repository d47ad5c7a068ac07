"""Compare decode steps with full attention over the same records, while generation goes on.

In: the forward passes of an attached model whose cache asks for it. Out: KL, top-1 agreement and attention mass in
the cache's account. Each verified token runs twice: densely first, then, after that token is forgotten, sparsely.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import nn

from farkv._axes import Tensor
from farkv.hf.cache import FarCache, FarLayer


class Verifier(threading.local):
    """The pair of hooks around the whole model."""

    def __init__(self) -> None:
        self.reference: Tensor | None = None

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Run the dense pass and keep its logits."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FarCache) or cache.recipe.dense:
            return
        # A step that failed before its comparison has left these.
        self.reference, cache.recipe.measuring, cache.account.counts_bytes = None, False, True
        if cache.verify_steps <= 0:
            return
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if tokens is None or tokens.shape[1] != 1 or cache.get_seq_length() == 0:
            return
        cache.account.counts_bytes = False
        self.reference = run_dense(model, cache, args, kwargs)
        cache.recipe.measuring = True
        cache.verify_steps -= 1

    def after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Compare."""
        cache = kwargs.get("past_key_values")
        if self.reference is None or not isinstance(cache, FarCache) or cache.recipe.dense:
            return
        reference, self.reference = self.reference, None
        cache.recipe.measuring, cache.account.counts_bytes = False, True
        logits = out.logits[:, -1].float().log_softmax(-1)
        full = reference.float().log_softmax(-1)
        kl = (full.exp() * (full - logits)).sum(-1)
        # Deliberate syncs: verified steps are not timed.
        cache.account.kl += [max(0.0, x) for x in kl.tolist()]
        cache.account.agreements += (full.argmax(-1) == logits.argmax(-1)).tolist()


@torch.no_grad()
def run_dense(model: nn.Module, cache: FarCache, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Run one token with full attention and leave the cache as it was."""
    layers: list[Any] = cache.layers
    stock = {i: layer for i, layer in enumerate(layers) if not isinstance(layer, FarLayer)}
    before = {i: layer.get_seq_length() for i, layer in enumerate(layers) if i not in stock}
    cache.recipe.dense = True
    try:
        for i, layer in stock.items():
            # Sliding and linear layers cannot step back; they are small, so the dense pass gets copies.
            layers[i] = copy.deepcopy(layer)
        return model(*args, **kwargs).logits[:, -1]
    finally:
        for i, layer in stock.items():
            layers[i] = layer
        try:
            for i, length in before.items():
                # An exception may have stopped the pass half way: only layers that took the token give it back.
                layers[i].crop(length - layers[i].get_seq_length())
        finally:
            # Stopped once more: the next pass finds that layers differ.
            cache.recipe.dense = False
