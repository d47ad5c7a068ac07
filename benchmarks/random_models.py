"""Random models of a given shape, and plans made by hand for them: for what needs bytes and time, not words."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from farkv import Plan
from farkv.calibrate.plan import Allocation
from farkv.hf.identity import identify_model


def make_llama(tokens: int, dtype: torch.dtype = torch.float32, *, seed: int = 5, **shape: Any) -> LlamaForCausalLM:
    """Make a model with room for `tokens`.

    Args:
        shape: layers, heads, kv_heads, hidden, mlp and vocabulary; `head_dim` where it is not hidden / heads.
    """
    torch.manual_seed(seed)
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "hidden": "hidden_size", "mlp": "intermediate_size", "vocabulary": "vocab_size"}  # fmt: skip
    config = LlamaConfig(max_position_embeddings=tokens, **{names.get(name, name): n for name, n in shape.items()})
    return LlamaForCausalLM(config).to(dtype).eval()


def make_shares(n_layers: int, mean: float) -> tuple[float, ...]:
    """Return uneven shares: the first layer keeps 1.5 times the mean, the last half of it."""
    return tuple(mean * (1.5 - i / max(1, n_layers - 1)) if n_layers > 1 else mean for i in range(n_layers))


def make_keep_plan(model: Any, mean: float) -> Plan:
    """Make a plan of these shares by hand."""
    n_layers = model.config.num_hidden_layers
    zeros = (0.0,) * n_layers
    keep = Allocation(make_shares(n_layers, mean), 0, "uniform", {"ratio": mean}, zeros, zeros)
    return Plan(identify_model(model), tuple(range(n_layers)), {"keep": keep})
