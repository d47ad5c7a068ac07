"""Whole models of a shape, with random weights and a small vocabulary; several can use the same weights.

In: a shape, layers, a dtype. Out: a Hugging Face model whose outputs are finite but meaningless, at the real cost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from farkv.bench.shapes import ModelShape

VOCABULARY = 1024
# Weights repeat one block of random numbers; its length is not a multiple of any row length.
BLOCK = (1 << 20) + 7


def make_config(shape: ModelShape, layers: int, tokens: int) -> tuple[type[Any], Any]:
    """Return the model class and configuration of a shape with room for `tokens`."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": tokens,
        "attn_implementation": "sdpa",
    }
    if shape.family == "opt":
        return OPTForCausalLM, OPTConfig(ffn_dim=shape.mlp, word_embed_proj_dim=shape.hidden, **common)
    common |= {
        "intermediate_size": shape.mlp,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": True,
    }
    if shape.family == "qwen3":
        return Qwen3ForCausalLM, Qwen3Config(**common)
    return LlamaForCausalLM, LlamaConfig(**common)


def make_model(shape: ModelShape, layers: int, tokens: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights, without the minutes that the usual initialisation takes.

    Args:
        tokens: maximum context length.
    """
    kind, config = make_config(shape, layers, tokens)
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    fill_weights(model)
    model.tie_weights()
    # Buffers (RoPE tables) are copied from a one-layer model that is initialised as usual.
    small = kind(make_config(shape, 1, tokens)[1])
    tables = dict(small.named_buffers())
    for name, table in model.named_buffers():
        table.copy_(tables[name])
    return model


@torch.no_grad()
def fill_weights(model: PreTrainedModel) -> None:
    """Set every weight matrix to small random numbers, norms to ones and biases to zeros.

    Cost: one write of all weights.
    """
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        flat = weight.view(-1)
        if weight.dim() < 2:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        typed = block.to(weight.dtype)
        for start in range(0, flat.numel(), BLOCK):
            piece = flat[start : start + BLOCK]
            piece.copy_(typed[: piece.numel()])


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model over the same weight tensors; hooks on one do not affect the other."""
    weights: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def count_weight_bytes(shape: ModelShape, layers: int, itemsize: int) -> int:
    """Return the bytes of a model's weights, ignoring norms and the small vocabulary."""
    width = shape.heads * shape.head_dim + shape.kv_heads * shape.head_dim
    matrices = 2 if shape.family == "opt" else 3
    return layers * shape.hidden * (2 * width + matrices * shape.mlp) * itemsize
