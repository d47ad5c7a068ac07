"""Every causal language model that transformers has, tiny: a few of its layers, one of each kind at least.

In: a name of `MODEL_FOR_CAUSAL_LM_MAPPING`. Out: a model of random weights, the same at every run. A tiny configuration
is the default one with sizes made small by their names; what has an entry per layer keeps those of the chosen layers.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import fields
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
VOCAB = 128
# Tokens of a prompt are drawn from these; what means an image, or an end, is above.
FIRST, LAST = 4, 90
# What has this name is this large, unless it is smaller already; the first pattern that fits the whole name counts.
SIZES: dict[str, int] = {
    r"(num_)?(hidden_|decoder_|encoder_|global_)?layers|n_layers?|depth|num_blocks": LAYERS,
    r"(\w+_)?vocab_size(_\w+)?|num_embeddings|encoder_hash_byte_group_vocab": VOCAB,
    # Positions are no weights but where they are learned.
    r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_(seq_len|source_positions|target_positions)": 512,
    r"mm_tokens_per_image|num_position_embeddings": 16,
    r"num_kv_shared_layers": 2,
    # Heads.
    r"mamba_n_heads": 8,
    r"rotary_dim": 8,
    r"(\w+_)?(num_|n_)(\w+_)?(key_value|kv|query)_?(heads|groups)|kv_n_heads": 2,
    r"(\w+_)?(attention_heads|n_heads?|num_heads|num_key_heads|num_value_heads|mamba_heads|num_heads_per_\w+)": 4,
    r"linear_num_(key|value)_heads": 2,
    r"(qk|index)_(rope|nope)_head_dim": 8,
    r"(\w+_)?(head_dim|dim_head|head_size|d_head|kv_channels|headdim|d_kv)": 16,
    # Widths.
    r"(\w+_)?(hidden_size|d_model|n_embd|dim_model|emb_dim|embed_dim|lru_width|word_embed_proj_dim|embedding_size"
    r"|input_size|hidden_size_global|embedding_dim|width)": 64,
    r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|dim_ff|d_ff|dff|n_inner|mlp_dim"
    r"|intermediate_size_mlp)": 96,
    r"adapter_(in|out)_dim|adapter_input_size": 64,
    r"hidden_size_per_layer_input|laurel_rank|router_hidden_size|adapter_rank|\w+_lowrank": 16,
    r"(q|kv|o)_lora_rank": 16,
    # Experts.
    r"(num|n)_(\w+_)?experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_(tok|token)|moe_(topk|top_k|k)": 2,
    r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups|o_groups": 1,
    # State spaces.
    r"(\w+_)?(d_state|state_size)|time_step_rank|mamba_dt_rank": 8,
    r"(\w+_)?chunk_size|block_size": 8,
    # Windows are shorter than the prompt, so that they show.
    r"(\w+_)?(sliding_window(_size)?|window_size|window_len|local_attention)|attention_chunk_size": 16,
    r"index_topk": 8,
    r"image_size|crop_size": 32,
    r"patch_size": 16,
    r"codebook_size": 64,
    r"num_codebooks|num_quantizers": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
MIXER = {"mamba_n_heads": 8, "mamba_d_head": 16}
GEMMA4 = {"global_head_dim": 32}
SLIDING_LATENTS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16, "head_dim": 16, "use_dsa": True,
    "rope_parameters": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
HYBRID = ["linear_attention", "hybrid"] * 2
# What the large model needs, to be one.
LARGE: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "full_attention"]},
}
# Weights are larger than at a usual start, so that attention is peaked.
PEAKED = {"initializer_range", "init_std"}
# Where names say too little. "a.b" is b of the configuration a; None leaves a value to the configuration itself.
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **MIXER},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots1": EXPERTS,
    "dots3_note": {f"text_config.{name}": value for name, value in SLIDING_LATENTS.items()},
    "dots3_note_text": SLIDING_LATENTS,
    "falcon_h1": {"mamba_d_ssm": 128, **MIXER},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, **MIXER},
    "gemma4": {f"text_config.{name}": value for name, value in GEMMA4.items()},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {f"text_config.{name}": value for name, value in GEMMA4.items()},
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": None},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{name}": value for name, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def list_names() -> list[str]:
    """Return the name of every configuration that stands for a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink_size(name: str, value: int) -> int:
    """Return a size made small by its name."""
    for pattern, small in SIZES.items():
        if re.fullmatch(pattern, name):
            return min(value, small) if value > 0 else value
    return value


def count_layers(config: PretrainedConfig) -> int:
    """Return the layers of a configuration, 0 where it does not say."""
    n = read_value(config, "num_hidden_layers")
    return n if isinstance(n, int) else 0


def choose_layers(config: PretrainedConfig) -> list[int]:
    """Return which layers of a large model a tiny one has: of every list by layer each value once, then the first."""
    n = count_layers(config)
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == n and not lists_layers(v)]
    chosen: list[int] = []
    for values in lists:
        for value in dict.fromkeys(map(repr, values)):
            where = [i for i, each in enumerate(values) if repr(each) == value]
            if not set(where) & set(chosen):
                chosen.append(where[0])
    # Full attention is what is managed: two layers of it, so that one looks ahead to the other.
    types = getattr(config, "layer_types", None) or []
    full = [i for i, kind in enumerate(types[:n]) if kind == "full_attention"]
    chosen += [i for i in full if i not in chosen][: max(0, 2 - len(set(full) & set(chosen)))]
    chosen += [i for i in range(n) if i not in chosen][: max(0, LAYERS - len(chosen))]
    return sorted(chosen)


def shrink(config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments of a tiny configuration of the same class."""
    n, chosen = count_layers(config), choose_layers(config)
    small: dict[str, Any] = {}
    for name in (f.name for f in fields(config)):  # pyright: ignore[reportArgumentType]
        value = read_value(config, name)
        if isinstance(value, PretrainedConfig):
            small[name] = shrink(value)
        elif name in PEAKED:
            small[name] = 0.2
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = shrink_size(name, value)
        elif isinstance(value, list | tuple) and n and len(value) == n:
            small[name] = [value[i] for i in chosen]
            if isinstance(value[0], int) and not isinstance(value[0], bool):
                small[name] = [shrink_size(name, each) for each in small[name]]
        elif re.search(r"(layers|layer_ids|idxs|indices|indexes)$", name) and lists_layers(value):
            small[name] = [chosen.index(i) for i in value if i in chosen]
        elif value is not None and name != "id2label":
            small[name] = value
    share_heads(config, small)
    name_tokens(small)
    if n and "num_hidden_layers" in small:
        small["num_hidden_layers"] = len(chosen)
    return small


def read_value(config: PretrainedConfig, name: str) -> Any:
    """Return a value of all layers; where layers have values of their own, `getattr` refuses."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return vars(config).get(name)


def lists_layers(value: Any) -> bool:
    """Say whether this is a list of layers' numbers: they rise."""
    numbers = isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return numbers and all(a < b for a, b in itertools.pairwise(value))


def share_heads(config: PretrainedConfig, small: dict[str, Any]) -> None:
    """Keep as many key heads as query heads where the large model has as many."""
    heads, kv = (read_value(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads == kv and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)


def name_tokens(small: dict[str, Any]) -> None:
    """Move every special token into the small vocabulary, above what prompts are drawn from."""
    free = iter(range(LAST, VOCAB))
    for name in list(small):
        if name == "pad_token_id":
            small[name] = 0
        elif re.search(r"_token_(id|index)$", name) and small[name] is not None:
            small[name] = next(free)


def make_config(name: str) -> PretrainedConfig:
    """Make the tiny configuration of a name."""
    kind = CONFIG_MAPPING[name]
    hints = HINTS.get(name, {})
    small = shrink(kind(**LARGE.get(name, {})))
    for path, value in hints.items():
        *above, last = path.split(".")
        inner = small
        for key in above:
            inner = inner[key]
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    config = kind(**small)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    config.is_encoder_decoder = False
    return config


def make_model(name: str, attention: str = "") -> PreTrainedModel:
    """Make the tiny model of a name; it chooses its attention itself where none is named."""
    config = make_config(name)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, kind.config_class):
        # Of several parts the text's is meant, if there is one.
        config = next((part for part in vars(config).values() if isinstance(part, kind.config_class)), config)
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(7)
    model = kind._from_config(config, dtype=torch.float32, **chosen).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            # Norms, biases and sinks start constant: a forgotten one must show.
            weight.data += 0.1 * torch.randn_like(weight)
    return model
