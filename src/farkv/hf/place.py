"""Where a model computes, and by which attention: both must be of a kind that can be managed.

In: a model. Out: its device, its attention; or a refusal.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv.errors import UnsupportedModelError
from farkv.hf import _compat
from farkv.hf.attention import NAME

BASES = ("sdpa", "eager")


def find_device(model: nn.Module) -> torch.device:
    """Return the one device of a model.

    Raises:
        UnsupportedModelError: weights are offloaded, or on several devices.
    """
    name, devices = type(model).__name__, {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        n = sum(parameter.is_meta for parameter in model.parameters())
        raise UnsupportedModelError(
            f"{name}: {n} parameters are not in memory (device meta); expected all on one device: weights that "
            "accelerate offloads to a CPU or disk come and go in every pass; load the model without offloading, for "
            'example with device_map={"": "cpu"}, smaller (dtype, quantisation), or from_pretrained without low memory'
        )
    if len(devices) > 1:
        raise UnsupportedModelError(f"{name}: parameters on {len(devices)} devices; expected one device")
    return devices.pop()


def find_base(model: PreTrainedModel) -> str:
    """Return the attention that a model runs on.

    Raises:
        UnsupportedModelError: none that can be managed.
    """
    base = _compat.get_attention_name(model)
    if base not in BASES:
        raise UnsupportedModelError(
            f"attention implementation: expected one of {', '.join(BASES)}, got {base!r}; "
            'load the model with attn_implementation="sdpa"'
        )
    return base


def switch_attention(model: PreTrainedModel, base: str) -> None:
    """Let a model that runs on `base` call our attention function.

    Raises:
        UnsupportedModelError: it calls none by name.
    """
    _compat.set_attention_name(model, NAME)
    if _compat.get_attention_name(model) != NAME:
        _compat.set_attention_name(model, base)
        raise UnsupportedModelError(
            f"{type(model).__name__}: does not route attention through Hugging Face's attention interface"
        )
