"""Hugging Face's attention outside a model: the module its functions expect, and farkv's attention function over it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from farkv._axes import Float, Tensor
from farkv.bench.shapes import ModelShape


class AttentionModule(nn.Module):
    """The attributes that Hugging Face's attention functions read from the calling module."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal = True
        self.layer_idx = 0


class Attention:
    """One layer's sdpa or eager attention: an `AttentionFunction` for farkv, also called directly by the baselines."""

    sinks = None

    def __init__(self, shape: ModelShape, *, eager: bool = False):
        self.module, self.scaling = AttentionModule(shape).eval(), shape.scaling
        self.function: Any = eager_attention_forward if eager else sdpa_attention_forward

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output, [B, Hq, T, D]."""
        return self.function(self.module, q, k, v, mask, scaling=self.scaling, dropout=0.0)[0].transpose(1, 2)

    def wrap(self, out: Float[Tensor, "B Hq T Dv"]) -> Tensor:
        """Return an output that a kernel computed."""
        return out
