"""What a model is made of, as far as it is attached to: its decoder, blocks, attention modules, and managed layers.

In: a model, and the type of layers that a method manages. Out: an `Architecture`, or a refusal.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv.errors import UnsupportedModelError
from farkv.hf import _compat
from farkv.hf.indexed import find_form
from farkv.hf.place import find_device
from farkv.methods.records import IndexerForm

log = logging.getLogger("farkv")

INDEXED = "indexed_attention"


class Architecture(NamedTuple):
    """A decoder-only model.

    types, arguments: of every layer's cache layer, as transformers would make it.  managed: the layers of ours.
    n_groups: query heads per KV head.  indexer: the model's own, where it chooses for the managed layers.
    """

    decoder: nn.Module
    blocks: nn.ModuleList
    attention: dict[int, nn.Module]
    types: list[str]
    arguments: list[dict[str, Any]]
    managed: list[int]
    device: torch.device
    n_groups: int
    indexer: IndexerForm | None


def read_architecture(model: PreTrainedModel, layer_type: str) -> Architecture:
    """Return what a model is made of.

    Args:
        layer_type: of the layers that are managed.

    Raises:
        UnsupportedModelError: it cannot be attached to, or not by a method of such layers.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: an encoder-decoder model; expected a decoder-only causal LM")
    found = _compat.find_decoder(model)
    if found is None:
        raise UnsupportedModelError(f"{name}: no list of decoder blocks with attention modules was found")
    decoder, blocks = found
    attention, config = _compat.find_attention(blocks), _compat.text_config(model)
    types, arguments = _compat.describe_layers(config)
    managed = [i for i, kind in enumerate(types) if kind == layer_type and i in attention]
    device = find_device(model)
    indexer = find_form(attention, managed, name) if layer_type == INDEXED else None
    if not managed:
        hint = "; its own indexer chooses with attach(model, farkv.methods.Indexer())" if INDEXED in types else ""
        log.warning("%s: no full-attention layer, so nothing to manage: layers are %s%s", name, types, hint)
    n_groups = _compat.count_groups(config)
    return Architecture(decoder, blocks, attention, types, arguments, managed, device, n_groups, indexer)
