"""Tiny models with fixed weights, their texts, profiles and plans, and what a row of `golden_rows.py` is.

In: names and numbers. Out: what `golden_play.py` plays with, the same at every run.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import farkv
from farkv.demo import MODEL_PATH

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
QUESTION = "print(tiger_cloud)  # "
SLIDING = {"head_dim": 16, "sliding_window": 16}
# name -> (configuration class, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
    # A softcap; every second layer is left to Hugging Face.
    "gemma2": ("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 16}),
    # Learned sinks.
    "gpt_oss": (
        "GptOssConfig",
        {
            **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
    ),
    # Convolutions between, no list of keys at all.
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
}  # fmt: skip


class Row(NamedTuple):
    """One configuration.

    means: facts of `golden_rows.FACTS` that must hold of its receipt.  text: sequences, tokens, padding.  plan: shares
    per layer, by lever.  profile: whether one is measured before.
    """

    name: str
    methods: tuple[Any, ...]
    means: tuple[str, ...]
    model: str
    way: str
    text: tuple[int, int, int]
    plan: dict[str, tuple[float, ...]]
    profile: bool
    attach: dict[str, Any]
    cache: dict[str, Any]
    generate: dict[str, Any]


@functools.cache
def make_model(name: str) -> PreTrainedModel:
    """Return a model, the same one at every call: detaching leaves it as it was."""
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    family, _, dtype = name.partition("-")
    kind, own = MODELS[family]
    values = {**COMMON, **own, "eos_token_id": None, "bos_token_id": None}
    if family == "opt":
        del values["num_key_value_heads"]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            # Norms, biases and sinks start constant: a forgotten one must show.
            weight.data += 0.1 * torch.randn_like(weight)
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, dtype)) if dtype else model


def make_text(row: Row, seed: int = 1) -> dict[str, Tensor]:
    """Return ids and mask; sequence i of a padded batch starts with `padding` / (i + 1) tokens of it, the last none."""
    batch, tokens, padding = row.text
    if row.model == "demo":
        return {"input_ids": write_facts(tokens), "attention_mask": torch.ones(1, tokens, dtype=torch.long)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(batch - 1):
        ids[i, : padding // (i + 1)] = mask[i, : padding // (i + 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write_facts(tokens: int) -> Tensor:
    """Return the first tokens of the facts, and the question about one of them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    question = tokenizer(QUESTION)["input_ids"]
    return torch.tensor([tokenizer(list_facts())["input_ids"][: tokens - len(question)] + question])


def list_facts() -> str:
    """Return lines of code of which each says something else."""
    words = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "candle")
    lines = [f"{a}_{b} = {17 * i + 23 * j + 11}\n" for i, a in enumerate(words) for j, b in enumerate(words)]
    return "".join(lines) * 9


@functools.cache
def measure_profile(name: str) -> farkv.Profile:
    """Return the profile of a tiny model, measured on two texts of its own; the demo model's is beside it."""
    if name == "demo":
        return farkv.Profile.load(MODEL_PATH / "profile.safetensors")
    generator = torch.Generator().manual_seed(5)
    return farkv.profile(make_model(name), [torch.randint(1, VOCAB, (160,), generator=generator) for _ in range(2)])


def write_plan(row: Row, path: Path) -> Path:
    """Write the plan file of a row's shares: the file is what stays the same."""
    n_layers = len(next(iter(row.plan.values())))
    levers = {
        name: {"base": 0, "rule": "xkv", "budget": {"ratio": sum(shares) / n_layers}}
        | {key: list(shares) for key in ("shares", "retention", "uniform")}
        for name, shares in row.plan.items()
    }
    identity = measure_profile(row.model).identity
    plan = {"format": "farkv-plan-1", "identity": identity, "layers": list(range(n_layers)), "levers": levers}
    path.write_text(json.dumps(plan))
    return path
