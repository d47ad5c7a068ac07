"""Compare decode steps with full attention over the same records during generation.

In: the forward passes of an attached model whose cache asks for it. Out: KL, top-1 agreement and attention mass in
the cache's account. Each verified token runs twice: densely first, then, after that token is forgotten, sparsely. Both
are one pass to the cache: wherever it is stopped, it is taken back as a whole.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import nn

from farkv._axes import Tensor
from farkv.errors import CacheStateError, ConfigError
from farkv.hf.arguments import count_new, find_cache, replace_cache
from farkv.hf.cache import FarCache
from farkv.hf.dense_cache import DenseCache

ATTACHED = "copying a model: it is attached, and its hooks belong to this one; detach it first, copy it, attach both"


class Verifier(threading.local):
    """The pair of hooks around the whole model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Verifier:
        raise CacheStateError(ATTACHED)

    def __reduce__(self) -> Any:
        raise CacheStateError(ATTACHED)

    def __init__(self) -> None:
        self.reference: Tensor | None = None

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Run the dense pass and keep its logits; the cache has noted already what this pass finds."""
        cache = find_cache(args, kwargs)
        if cache is None:
            return
        # A step that failed before its comparison has left these.
        self.reference = None
        if cache.verify_steps <= 0 or count_new(args, kwargs) != 1 or cache.get_seq_length() == 0:
            return
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ConfigError(
                f"verify: expected a model that makes logits, got {type(model).__name__}, which has no head; make the "
                "cache without verify"
            )
        self.reference = run_dense(model, cache, args, kwargs)
        cache.verify_steps -= 1
        cache.engine.set_mode(measures=True)
        cache.restart_clock()

    def after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Compare."""
        cache = find_cache(args, kwargs)
        if self.reference is None or cache is None:
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
    tokens = cache.get_seq_length()
    args, kwargs = replace_cache(args, kwargs, DenseCache(cache.layers))
    cache.engine.set_mode(dense=True)
    logits = model(*args, **kwargs).logits[:, -1]
    for layer in cache.engine.layers:
        cache.engine.cut(layer, tokens, remembers=cache.engine.store.limits.quant is not None)
    return logits
