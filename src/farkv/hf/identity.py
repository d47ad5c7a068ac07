"""Who a model is: enough to tell that a file was made for it, the same at every dtype."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from farkv.hf import _compat


def identify_model(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's family, shape and a digest of a few weights.

    The weights are rounded to bfloat16 first, so that one checkpoint loaded in two dtypes is one model.
    """
    config = _compat.text_config(model)
    digest = hashlib.sha256()
    embedding: Any = model.get_input_embeddings().weight
    last = list(model.parameters())[-1]
    for weight in (embedding[:64], last.reshape(-1)[:4096]):
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model_type": str(config.model_type),
        "layers": str(config.num_hidden_layers),
        "hidden": str(config.hidden_size),
        "weights": digest.hexdigest()[:32],
    }
