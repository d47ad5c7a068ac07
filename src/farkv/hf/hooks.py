"""What the hooks of an attached model do on their way: hand our layers to attention, and see that it is still attached.

In: a call's arguments. Out: the same with our layer, or a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.arguments import find_layers
from farkv.hf.attention import NAME
from farkv.hf.cache import FarCache
from farkv.hf.indexed import IndexedLayer
from farkv.hf.layer import FarLayer


def make_inject(i: int) -> Any:
    """Return a hook that hands layer i of one of our caches to the attention function."""

    def inject(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        layers = find_layers(args, kwargs)
        layer = None if layers is None else layers[i]
        if not isinstance(layer, FarLayer):
            return None
        if isinstance(layer, IndexedLayer):
            layer.note_mask(kwargs.get("attention_mask"))
        # The dict is this call's own.
        kwargs["far_layer"] = layer
        return args, kwargs

    return inject


def check_attached(model: PreTrainedModel, made_by: int, handle: int) -> None:
    """Raise CacheStateError unless attention is still ours, and the cache one of this handle's."""
    name = _compat.get_attention_name(model)
    if name != NAME:
        raise CacheStateError(
            f"attention implementation: expected {NAME!r}, which attach set, got {name!r}: it was switched while the "
            "model is attached; detach first, then switch, then attach again"
        )
    if made_by != handle:
        raise CacheStateError(
            "this cache: expected one of this attached model, got one that another attach made; call new_cache() of "
            "the handle in use"
        )


def check_pass(model: PreTrainedModel, cache: FarCache, handle: int, ids: Tensor | None) -> None:
    """Raise CacheStateError unless this pass may run on this cache.

    A deliberate sync, of a pass as long as the prompt on a cache that holds some of it: of assisted decoding alone.
    """
    check_attached(model, cache.made_by, handle)
    n_prompt, held = cache.account.prompt_tokens, cache.get_seq_length()
    if ids is None or n_prompt is None or not 0 < held < n_prompt <= ids.shape[1]:
        return
    known = cache.token_ids
    if len(known) == held and torch.equal(ids[0, :held].to("cpu"), known):
        raise CacheStateError(
            f"assisted decoding: this cache holds {held} tokens, and generate reads the whole prompt of {n_prompt}, "
            "those among them, again; make a new cache, or generate without an assistant or prompt_lookup_num_tokens"
        )


def check_weights(model: PreTrainedModel, cache: FarCache, n_new: int, kwargs: dict[str, Any]) -> None:
    """Raise CacheStateError where a call asks for attention weights, and there are none over the whole context."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(model.config, "output_attentions", False)
    if asked and not cache.engine.has_weights(n_new):
        raise CacheStateError(
            "output_attentions: expected a pass that reads every record by the model's own attention, got one that "
            "reads a choice of them, in blocks or by a kernel, so there are no weights over the context; attach Full() "
            "without near, disk and evict, or leave output_attentions out"
        )


def note_positions(cache: FarCache, kwargs: dict[str, Any]) -> None:
    """Note positions that are no count of tokens: of an image they have three parts, which differ."""
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() == 3 and not cache.has_positions:
        # A deliberate sync, of models that see images.
        cache.has_positions = bool((positions != positions[-1:]).any())


def find_unread(layers: list[Any]) -> str:
    """Return why a pass is wrong whose attention never asked for what it had stored; empty where all was read."""
    for layer in layers:
        if isinstance(layer, FarLayer) and layer.handed is not None:
            layer.handed = None
            return (
                f"layer {layer.layer}: this model stores keys and values, and attends to others by code of its own; it "
                "cannot be managed, use an ordinary cache"
            )
    return ""
