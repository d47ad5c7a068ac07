"""Tiny random models, one per architecture, and prompts for them. Real transformers classes, nothing mocked.

The weights are larger than at a usual start, so that attention is peaked and a choice of records matters.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from farkv.methods import Indexer

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# family -> (configuration class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, **MOE}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "num_key_value_heads": None}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.35, "residual_multiplier": 0.7}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
            **MOE,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "moe_layers": [1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        },
    ),
}

# Models that were trained with an indexer of their own, which chooses 16 tokens, in blocks of 4, and the last few.
INDEXED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        {
            "head_dim": 8,
            "hc_count": 2,
            "hc_lowrank": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "layer_types": ["indexed_attention"] * 4,
            **MOE,
        },
    ),
}
# As the real one is made: most layers are linear attention.
MIXED = {"layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"]}
INDEXED["qwen4_exp_mixed"] = ("Qwen4ExpTextConfig", INDEXED["qwen4_exp"][1] | MIXED)


@functools.cache
def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return the tiny model of a family, the same one at every call: attach and detach must leave it as it was."""
    name, own = (FAMILIES | INDEXED)[family]
    values = {k: v for k, v in {**COMMON, **own}.items() if v is not None or k in {"eos_token_id", "sliding_window"}}
    implementation = changes.pop("implementation", None)
    config = getattr(transformers, name)(**{**values, **changes})
    config.eos_token_id = config.bos_token_id = None
    torch.manual_seed(7)
    chosen = {} if implementation is None else {"attn_implementation": implementation}
    model = AutoModelForCausalLM.from_config(config, **chosen).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            # Norms, biases and sinks start constant: move them, so that a forgotten one shows.
            weight.data += 0.1 * torch.randn_like(weight)
    model.generation_config.eos_token_id = None
    return model


def model_for(*methods: Any) -> PreTrainedModel:
    """Return the tiny model of these methods' tests: llama, or where the model is to choose, one with an indexer."""
    if not any(isinstance(method, Indexer) for method in methods):
        return make_model("llama")
    if not hasattr(transformers, "Qwen4ExpTextConfig"):
        pytest.skip("this transformers has no model with an indexer of blocks")
    return make_model("qwen4_exp")


def make_prompt(batch: int = 1, tokens: int = 24, pad: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """Return ids and mask; row i of a padded batch starts with about `pad` / (i + 1) padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(batch if pad else 0):
        n = pad // (i + 1) if i + 1 < batch else 0
        ids[i, :n], mask[i, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, prompt: dict[str, Tensor], cache: Any = None, n: int = 6, **options: Any) -> Any:
    """Generate greedily (unless told otherwise) and return tokens and logits."""
    return model.generate(
        **prompt,
        past_key_values=cache,
        max_new_tokens=n,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )


def forward(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Run tokens through the model on a cache and return the logits of all of them."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    """Return Hugging Face's own cache."""
    return DynamicCache(config=model.config)


def assert_same(ours: Any, plain: Any) -> None:
    """Tokens equal, logits bit-equal."""
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.logits) == len(plain.logits)
    worst = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours.logits, plain.logits, strict=True))
    assert worst == 0.0, f"tokens agree, logits differ by up to {worst:g}"
