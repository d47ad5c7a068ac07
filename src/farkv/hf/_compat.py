"""Every private or version-dependent symbol of transformers that farkv uses, and nothing else.

Tested on 5.16 to 5.23 (CI runs the bit-exact matrix on the oldest and the newest).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = [
    "Cache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "count_groups",
    "describe_indexer",
    "describe_layers",
    "find_attention",
    "find_decoder",
    "find_layer_class",
    "find_padding",
    "find_rotation",
    "forget_quantization",
    "get_attention_name",
    "get_eager_attention",
    "name_quantization",
    "register",
    "sdpa_attention_forward",
    "set_attention_name",
    "set_gguf_bar",
    "supports_sdpa",
    "text_config",
    "unpack_gguf",
    "version",
]

version: str = transformers.__version__


def register(name: str, attention: Callable[..., Any]) -> None:
    """Make `name` an attention implementation, with the bool-or-None mask of sdpa."""
    AttentionInterface.register(name, attention)
    # Without a mask function of that name, Hugging Face would pass no mask and padding would be attended to.
    AttentionMaskInterface.register(name, sdpa_mask)


def text_config(model: PreTrainedModel) -> Any:
    """Return the configuration of the text decoder."""
    return model.config.get_text_config(decoder=True)


def list_configs(config: Any) -> list[Any]:
    """Return a config per layer where layers differ: that of all refuses what they differ in; else the one of all."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def count_groups(config: Any) -> int:
    """Return the most query heads per KV head of any layer, as a model's config says; 1 where it does not."""
    most = 1
    for each in list_configs(config):
        heads, kv_heads = (getattr(each, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0:
            most = max(most, heads // kv_heads)
    return most


def describe_heads(config: Any) -> tuple[int, int, int]:
    """Return KV heads, their dimension and the query heads of each, as a config says; else 1, 64 and 1.

    Where layers differ, those of the first that attends to everything: it is managed.
    """
    configs, types = list_configs(config), getattr(config, "layer_types", None) or []
    one = configs[types.index("full_attention")] if len(configs) > 1 and "full_attention" in types else configs[0]
    heads, kv_heads, dim, hidden = (
        value if isinstance(value := getattr(one, name, None), int) and value > 0 else 0
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    dim = dim or (hidden // heads if heads else 0) or 64
    return kv_heads or heads or 1, dim, count_groups(one)


def describe_layers(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Return each layer's cache type and the arguments of its cache layer of its own."""
    types, arguments = get_layer_types_and_kwargs(config)
    # Older releases have one set of arguments for all layers, newer ones a set per layer.
    each = [dict(arguments) for _ in types] if isinstance(arguments, dict) else list(arguments)
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:
        modes = ["store" if getattr(config, "num_kv_shared_layers", None) else None] * len(types)
    elif "reuse" not in modes:
        modes = [None] * len(types)
    # A layer whose K and V others read must stay whole, so it is left to Hugging Face.
    return ["shared_" + t if mode == "store" else t for t, mode in zip(types, modes, strict=True)], each


def describe_indexer(attention: nn.Module) -> tuple[int, int, int] | None:
    """Return the key dimension, the budget in tokens and the tokens of a block of an attention's own indexer.

    None where it has none, or one that does not choose blocks of tokens.
    """
    names = ("index_head_dim", "token_budget", "compress_ratio", "block_topk")
    found = [getattr(getattr(attention, "indexer", None), name, None) for name in names]
    dim, budget, block, topk = (n if type(n) is int and n > 0 else 0 for n in found)
    return (dim, budget, block) if dim and block and budget == topk * block else None


def find_layer_class(layer_type: str) -> type[Any]:
    """Return the class of Hugging Face's own cache layer of a type."""
    return DYNAMIC_LAYER_TYPE_MAPPING[layer_type.removeprefix("shared_")]


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList] | None:
    """Return the decoder and its list of blocks: the ModuleList as long as the config says, with attention in it."""
    n_layers = getattr(text_config(model), "num_hidden_layers", None)
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and find_attention(child):
                return parent, child
    return None


def find_attention(blocks: nn.Module) -> dict[int, nn.Module]:
    """Return the attention module of every layer that has one."""
    return {
        index: module
        for module in blocks.modules()
        if "Attention" in type(module).__name__ and isinstance(index := getattr(module, "layer_idx", None), int)
    }


def get_attention_name(model: PreTrainedModel) -> str:
    """Return the attention implementation in use."""
    return text_config(model)._attn_implementation


def set_attention_name(model: PreTrainedModel, name: str) -> None:
    """Switch the attention implementation of the (text) model."""
    if text_config(model) is model.config:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation({"text_config": name})


def supports_sdpa(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Say whether the architecture may run on torch's fused attention: the text's own, where there are several."""
    return bool(getattr(decoder if isinstance(decoder, PreTrainedModel) else model, "_supports_sdpa", False))


def get_eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the model file's own plain attention: it knows softcap, sinks and whatever else is special."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def find_padding(config: Any) -> int:
    """Return the token that `generate` puts behind a sequence that has ended, by the configuration it has prepared."""
    pad = config._pad_token_tensor
    return 0 if pad is None else int(pad.flatten()[0])


def find_rotation(module: nn.Module) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return the model file's own rotary embedding of a query, None where it has none of the usual name."""
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    # It turns a query and a key; one head is enough of a key that nobody reads.
    return None if rotate is None else lambda q, cos, sin: rotate(q, q[:, :1], cos, sin)[0]


def unpack_gguf() -> dict[str, Any]:
    """Return the arguments by which a GGUF file's weights become plain tensors, also where its blocks could be kept."""
    config = getattr(transformers, "GgufConfig", None)
    # Older ones keep no blocks.
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def set_gguf_bar(bar: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Replace the progress bar of a GGUF file, which transformers draws whatever its own switch says.

    Returns:
        The one before; None where this release has none, and none is set.
    """
    module: Any = modeling_gguf_pytorch_utils
    before = getattr(module, "tqdm", None)
    if before is not None and bar is not None:
        module.tqdm = bar
    return before


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model whose weights are plain tensors be an ordinary one: converted, copied and saved."""
    options: Any = model
    if hasattr(options.config, "quantization_config"):
        del options.config.quantization_config
    options.is_quantized, options.hf_quantizer = False, None


def name_quantization(model: PreTrainedModel) -> str | None:
    """Return the method by which a model's weights are quantised; None where they are plain."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


# Whether torch.compile is tracing.
is_compiling = torch.compiler.is_compiling
