"""Compare decode steps with full attention over the same records during generation.

In: the forward passes of an attached model whose cache asks for it. Out: KL, top-1 agreement and attention mass in
the cache's account. Each verified token runs twice: densely first, then, after that token is forgotten, sparsely.
"""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import torch
from torch import nn

from farkv._axes import Tensor
from farkv.hf.cache import FarCache
from farkv.hf.layer import FarLayer


class Verifier(threading.local):
    """The pair of hooks around the whole model."""

    def __init__(self) -> None:
        self.reference: Tensor | None = None

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Run the dense pass and keep its logits."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FarCache) or cache.engine.mode.dense:
            return
        # A step that failed before its comparison has left these.
        self.reference = None
        cache.engine.set_mode()
        if cache.verify_steps <= 0:
            return
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if tokens is None or tokens.shape[1] != 1 or cache.get_seq_length() == 0:
            return
        self.reference = run_dense(model, cache, args, kwargs)
        cache.engine.set_mode(measures=True)
        cache.verify_steps -= 1

    def after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Compare."""
        cache = kwargs.get("past_key_values")
        if self.reference is None or not isinstance(cache, FarCache) or cache.engine.mode.dense:
            return
        reference, self.reference = self.reference, None
        cache.engine.set_mode()
        logits = out.logits[:, -1].float().log_softmax(-1)
        full = reference.float().log_softmax(-1)
        # A word that the model itself rules out adds nothing.
        kl = torch.where(full == -torch.inf, 0.0, full.exp() * (full - logits)).sum(-1)
        same = full.argmax(-1) == logits.argmax(-1)
        # Deliberate syncs: verified steps are not timed.
        for nats, agrees in zip(kl.tolist(), same.tolist(), strict=True):
            if math.isfinite(nats):
                cache.account.kl.append(max(0.0, nats))
                cache.account.agreements.append(agrees)
            else:
                # Logits of NaN or infinity have no distance; a mean must not hide them, nor be one.
                cache.account.add_fallback("not_finite")


@torch.no_grad()
def run_dense(model: nn.Module, cache: FarCache, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Run one token with full attention and leave the cache as it was."""
    layers: list[Any] = cache.layers
    unmanaged = {i: layer for i, layer in enumerate(layers) if not isinstance(layer, FarLayer)}
    before = {i: layer.get_seq_length() for i, layer in enumerate(layers) if i not in unmanaged}
    cache.engine.set_mode(dense=True)
    try:
        for i, layer in unmanaged.items():
            # Sliding and linear layers cannot step back; they are small, so the dense pass gets copies.
            layers[i] = copy.deepcopy(layer)
        return model(*args, **kwargs).logits[:, -1]
    finally:
        for i, layer in unmanaged.items():
            layers[i] = layer
        try:
            for i, length in before.items():
                # An exception may have stopped the pass half way: only layers that took the token give it back.
                layers[i].crop(length - layers[i].get_seq_length())
        finally:
            # Stopped once more: the next pass finds that layers differ.
            cache.engine.set_mode()
