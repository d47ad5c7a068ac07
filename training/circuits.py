"""Start values that already hold an induction circuit: training need not wait for one to emerge.

In: a fresh `LlamaForCausalLM`. Out: the same model, changed in place: heads of layer 0 look back 1,
2 and 3 tokens and copy what they see; heads of layer 2 look for places whose preceding token is
like the current one and raise the token found there. Training may change every weight.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

SCALE = 5.0  # embeddings start this many times larger than usual: they keep apart for longer
CONSTANT = 0.08  # embedding dimension 0 of all tokens: 4 standard deviations, before scaling
BACK, FIND = 0, 2  # layers of the look-back heads and of the finding heads
OFFSETS = (1, 2, 1, 3)  # how far each query head of layer BACK looks back


def draw_orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Return a random matrix whose rows or columns, whichever are fewer, are orthonormal."""
    if rows > columns:
        return torch.linalg.qr(torch.randn(rows, columns))[0]
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


def turn_back(vector: torch.Tensor, steps: float, theta: float) -> torch.Tensor:
    """Rotate by RoPE through `-steps` positions (halves layout)."""
    half = len(vector) // 2
    angle = -steps * theta ** (-torch.arange(half) / half)
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def set_looking_back(layer, dim: int, theta: float) -> None:
    """Make each query head attend a fixed number of tokens back, and pass on what is there."""
    a = layer.self_attn
    fast = torch.zeros(dim)
    fast[:5] = 1.5
    a.q_proj.weight.mul_(0.3)
    a.k_proj.weight.mul_(0.3)
    a.k_proj.weight[:, 0] = fast.repeat(a.k_proj.weight.shape[0] // dim)
    for h, offset in enumerate(OFFSETS):
        a.q_proj.weight[h * dim : (h + 1) * dim, 0] = turn_back(fast, offset, theta)
    half = a.o_proj.weight.shape[0] // 2
    a.v_proj.weight.mul_(0.1)
    a.v_proj.weight[:, 1:half] = draw_orthonormal(half, half - 1)
    a.o_proj.weight.mul_(0.1)
    for g in range(2):
        rows = slice(half + g * dim, half + (g + 1) * dim)
        a.o_proj.weight[rows, 2 * g * dim : (2 * g + 1) * dim] = 0.02 * SCALE * torch.eye(dim)


def set_finding(layer, back, dim: int, sharp: float = 2.2) -> None:
    """Match the current token with the token before each place, over slowly turning dimensions."""
    a, b = layer.self_attn, back.self_attn
    slow = torch.zeros(dim)
    slow[dim // 4 : dim // 2] = sharp
    slow[dim // 2 + dim // 4 :] = sharp
    for g in range(2):
        seen = b.v_proj.weight[g * dim : (g + 1) * dim]
        written = 50 / SCALE * b.o_proj.weight[:, 2 * g * dim : (2 * g + 1) * dim]
        a.k_proj.weight[g * dim : (g + 1) * dim] += slow[:, None] * written.T
        for h in (2 * g, 2 * g + 1):
            a.q_proj.weight[h * dim : (h + 1) * dim] += slow[:, None] * seen
    half = a.o_proj.weight.shape[0] // 2
    values = torch.zeros_like(a.v_proj.weight)
    values[:, 1:half] = draw_orthonormal(half, half - 1)
    a.v_proj.weight.copy_(values)
    by_head = values.view(2, 1, dim, -1).expand(2, 2, dim, -1).reshape(-1, values.shape[1])
    a.o_proj.weight.copy_(0.05 * SCALE * by_head.T)


@torch.no_grad()
def set_circuits(model: LlamaForCausalLM) -> None:
    """Write the look-back and the finding heads into a fresh model of 4 query and 2 KV heads."""
    config = model.config
    theta = config.rope_parameters["rope_theta"]
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = CONSTANT
    embeddings[:, embeddings.shape[1] // 2 :] *= 0.2
    embeddings *= SCALE
    model.model.norm.weight.fill_(3 / SCALE)
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    set_looking_back(layers[BACK], config.head_dim, theta)
    set_finding(layers[FIND], layers[BACK], config.head_dim)
