"""The Llama forward pass as the trainer runs it on a CPU: bf16 products where it has them, attention in query chunks.

In: a `LlamaForCausalLM` (its parameters are used, not its code) and tokens. Out: the final normed
states. PyTorch's own CPU attention spends up to two thirds of a step at these small heads; plain
batched products per chunk of queries take between a quarter and two thirds of its time.
`check_forward` compares with transformers.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

# Processors without bfloat16 products emulate them, more than ten times slower than float32.
DTYPE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class ChunkedAttention(torch.autograd.Function):
    """Causal softmax attention; queries (groups, repeats, T, D), keys and values (groups, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, chunk: int):
        groups, repeats, length, dim = q.shape
        out = torch.empty_like(q)
        mask = torch.full((chunk, chunk), float("-inf"), dtype=q.dtype).triu(1).repeat(repeats, 1)
        kept = []
        for i in range(0, length, chunk):
            j = i + chunk
            rows = q[:, :, i:j].reshape(groups, repeats * chunk, dim)
            scores = torch.bmm(rows, k[:, :j].transpose(1, 2))
            scores[:, :, i:] += mask
            weights = torch.softmax(scores, -1)
            out[:, :, i:j] = torch.bmm(weights, v[:, :j]).view(groups, repeats, chunk, dim)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.chunk = chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        groups, repeats, _, dim = q.shape
        chunk = ctx.chunk
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros(k.shape), torch.zeros(v.shape)
        for n, weights in enumerate(kept):
            i, j = n * chunk, n * chunk + chunk
            rows = q[:, :, i:j].reshape(groups, repeats * chunk, dim)
            g = grad[:, :, i:j].reshape(groups, repeats * chunk, dim)
            grad_v[:, :j] += torch.bmm(weights.transpose(1, 2), g)
            of_weights = torch.bmm(g, v[:, :j].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, DTYPE)
            grad_q[:, :, i:j] = torch.bmm(of_scores, k[:, :j]).view(groups, repeats, chunk, dim)
            grad_k[:, :j] += torch.bmm(of_scores.transpose(1, 2), rows)
        return grad_q, grad_k.to(DTYPE), grad_v.to(DTYPE), None


def rope_tables(length: int, dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and signed sines, (length, 1, dim), for `rotate`."""
    turn = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * turn
    cos, sin = angle.cos(), angle.sin()
    tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return tables[0][:, None].float(), tables[1][:, None].float()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps).to(DTYPE)


def attend(layer, h: torch.Tensor, tables, config) -> torch.Tensor:
    """Run one attention block on normed states (B, T, width)."""
    rows, length, _ = h.shape
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    a = layer.self_attn
    packed = torch.cat([a.q_proj.weight * dim**-0.5, a.k_proj.weight, a.v_proj.weight]).to(DTYPE)
    qkv = (h @ packed.T).view(rows, length, heads + 2 * kv, dim)
    qk = qkv[:, :, : heads + kv].float()
    qk = (qk * tables[0] + torch.roll(qk, dim // 2, -1) * tables[1]).to(DTYPE).transpose(1, 2)
    q = qk[:, :heads].reshape(rows * kv, heads // kv, length, dim)
    k = qk[:, heads:].reshape(rows * kv, length, dim)
    v = qkv[:, :, heads + kv :].transpose(1, 2).reshape(rows * kv, length, dim)
    out = ChunkedAttention.apply(q, k, v, min(length, 64 if length <= 1024 else 128))
    out = out.view(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, heads * dim)
    return out @ a.o_proj.weight.to(DTYPE).T


def run_model(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the final normed states, `DTYPE` (B, T, width), of tokens (B, T).

    T is at most 64 or a multiple of 64 (of 128 above 1024).
    """
    config, inner = model.config, model.model
    eps = config.rms_norm_eps
    tables = rope_tables(tokens.shape[1], config.head_dim, config.rope_parameters["rope_theta"])
    x = functional.embedding(tokens, inner.embed_tokens.weight)
    for layer in inner.layers:
        x = x + attend(layer, norm(x, layer.input_layernorm.weight, eps), tables, config)
        h = norm(x, layer.post_attention_layernorm.weight, eps)
        m = layer.mlp
        up = h @ torch.cat([m.gate_proj.weight, m.up_proj.weight]).to(DTYPE).T
        gate, up = up.chunk(2, -1)
        x = x + (functional.silu(gate) * up) @ m.down_proj.weight.to(DTYPE).T
    return norm(x, inner.norm.weight, eps)


def check_forward(model: LlamaForCausalLM, length: int = 256) -> float:
    """Return the largest relative difference of the states from transformers' in fp32."""
    tokens = torch.randint(0, model.config.vocab_size, (2, length))
    with torch.no_grad():
        want = model.model(tokens, use_cache=False).last_hidden_state
        got = run_model(model, tokens).float()
    return ((want - got).norm() / want.norm()).item()
