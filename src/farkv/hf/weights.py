"""Weights of linear maps in 8 or 4 bits, on a CPU: a decode step reads all of them once, so their bytes are its time.

In: a loaded model. Out: the same model, its linear maps replaced (hf/packed.py). Embeddings and norms stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv.config import WEIGHTS, check_name, format_bytes
from farkv.errors import ConfigError
from farkv.hf import _compat
from farkv.hf.identity import identify_model, keep_identity
from farkv.hf.load_gguf import count_bytes, note_source
from farkv.hf.packed import GROUP, MULTIPLE, Int4Linear, Int8Linear, PackedLinear, PortableInt8Linear

log = logging.getLogger("farkv")


# From so many weights on, FBGEMM gains more than two calls around it cost (docs/decisions/0023).
MANY_WEIGHTS = 1 << 20


def find_form(kind: str, source: nn.Linear) -> type[PackedLinear]:
    """Return what a linear map is replaced by."""
    if kind == "int4":
        return Int4Linear
    is_large = source.in_features * source.out_features >= MANY_WEIGHTS
    return Int8Linear if is_large and Int8Linear.is_possible() else PortableInt8Linear


def refuse_packing(kind: str, device: torch.device) -> ConfigError:
    """Return the error about packed weights on another device than a CPU."""
    return ConfigError(
        f"weights: {kind} is for a CPU, the model is to be on {device.type}; give --device cpu, or a checkpoint that "
        "is quantised for a GPU"
    )


def pack_weights(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Replace a model's linear maps by packed ones, one after the other; `none` changes nothing.

    Args:
        kind: `int8`: one scale per output. `int4`: a scale and a zero per 32 weights. `none`.

    Raises:
        ConfigError: no such kind; the model is not on a CPU; it is quantised already.

    Cost: one pass over the weights; besides the packed ones a few copies of one map at a time, in float32.
    """
    check_name("weights", kind, WEIGHTS)
    if kind == "none":
        return model
    if model.device.type != "cpu":
        raise refuse_packing(kind, model.device)
    if (method := _compat.name_quantization(model)) is not None:
        raise ConfigError(f"weights: expected plain weights, these are quantised by {method}; leave --weights out")
    if any(isinstance(child, PackedLinear) for child in model.modules()):
        raise ConfigError("weights: expected plain weights, these are packed already; load the model again")
    keep_identity(model, identify_model(model))
    before = count_bytes(model)
    parents = [part for part in model.modules() if type(part) is not nn.Linear]
    uses = Counter(id(child) for part in parents for child in part.children() if type(child) is nn.Linear)
    # What is shared stays shared. Its plain form is held to the end; every other one's goes before the next is packed.
    shared = dict[int, tuple[nn.Linear, PackedLinear]]()
    n_packed = 0
    for parent, name in [(part, name) for part in parents for name, _ in part.named_children()]:
        child = getattr(parent, name)
        if type(child) is not nn.Linear:
            continue
        if kind == "int4" and (child.in_features % GROUP or child.out_features % MULTIPLE):
            continue
        n_packed += id(child) not in shared
        made = shared[id(child)][1] if id(child) in shared else find_form(kind, child)(child)
        if uses[id(child)] > 1:
            shared[id(child)] = child, made
        setattr(parent, name, made)
    # No gradient passes through packed maps: none is to be asked for by default.
    model.requires_grad_(False)
    was = getattr(model, "farkv_source", None)
    note = f"{kind} of {n_packed} of {len(uses)} linear maps"
    note_source(model, note if was is None else f"{note}, packed from {was}")
    log.info("%s: %s in memory, before %s", note, format_bytes(count_bytes(model)), format_bytes(before))
    return model
