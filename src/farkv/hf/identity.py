"""A model's identity: enough to check that a file was made for it, independent of the dtype."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from farkv.hf import _compat
from farkv.hf.packed import PackedLinear

# Values of each parameter.
SAMPLED = 512


def keep_identity(model: Any, identity: dict[str, str]) -> None:
    """Let a model whose weights are packed be known as what it was packed from."""
    model.farkv_identity = identity


def identify_model(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's family, shape and a digest of a few weights.

    The weights are rounded to bfloat16 first, so that one checkpoint loaded in two dtypes is one model.
    """
    if (kept := getattr(model, "farkv_identity", None)) is not None:
        return dict(kept)
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


def digest_weights(model: PreTrainedModel) -> str:
    """Return a digest of some of every weight: what was trained on from another model is not that model.

    A model whose weights are packed is not the model that they were packed from: its keys are others.

    Cost: SAMPLED values of every parameter copied to the host.
    """
    digest = hashlib.sha256()
    packed = (part for child in model.modules() if isinstance(child, PackedLinear) for part in child.list_packed())
    for weight in chain(model.parameters(), packed):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        digest.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def identify_tokenizer(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer's words and template, None without one."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word}\0{number}\n".encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()[:32]
