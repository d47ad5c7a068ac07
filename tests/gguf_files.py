"""A tiny model as a GGUF file, written by the package gguf: a llama with a vocabulary of bytes and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCAB, HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 288, 32, 4, 2, 64, 3
SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}<|start|>"
MERGES = ["t h", "th e", "i n", "a n"]


def list_bytes() -> list[str]:
    """Return the 256 letters that stand for bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def list_weights(layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Return random weights by their names in the file, large enough for peaked attention."""
    rng = np.random.default_rng(0)
    width, keys = HIDDEN, HIDDEN // HEADS * KV_HEADS
    sizes = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width), "attn_output": (width, width)}
    sizes |= {"ffn_gate": (MLP, width), "ffn_up": (MLP, width), "ffn_down": (width, MLP)}
    found = {"token_embd.weight": (VOCAB, width), "output.weight": (VOCAB, width)}
    found |= {f"blk.{i}.{name}.weight": size for i in range(layers) for name, size in sizes.items()}
    weights = {name: 0.3 * rng.standard_normal(size).astype(np.float32) for name, size in found.items()}
    norms = ["output_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in range(layers) for n in ("attn", "ffn"))]
    return weights | {name: np.ones(width, np.float32) for name in norms}


def write_gguf(
    path: Path,
    *,
    kind: str = "Q8_0",
    architecture: str = "llama",
    leave_out: str = "",
    extra: dict[str, Any] | None = None,
    words: bool = True,
) -> dict[str, np.ndarray]:
    """Write a model and return its weights as they are in the file: matrices of `kind`, norms of float32.

    Args:
        leave_out: a weight, or the padding token's `pad`, that is not written.
        extra: further tensors, or fields of one number each.
        words: whether a vocabulary is in the file.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    if words:
        add_words(writer, pads=leave_out != "pad")
    weights, quant = list_weights(), gguf.GGMLQuantizationType[kind]
    for name, value in (extra or {}).items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            weights[name] = value
    held = {}
    for name, weight in weights.items():
        if name == leave_out:
            continue
        coded = gguf.quantize(weight, quant) if weight.ndim == 2 else weight
        writer.add_tensor(name, coded, raw_dtype=quant if weight.ndim == 2 else None)
        held[name] = gguf.dequantize(coded, quant) if weight.ndim == 2 else weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_words(writer: Any, *, pads: bool) -> None:
    """Add a byte-level vocabulary, two special tokens and a chat template."""
    words = [*list_bytes(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
    kinds = [1] * (len(words) - 2) + [3, 3]
    spare = VOCAB - len(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*words, *(f"[{i}]" for i in range(spare))])
    writer.add_token_types([*kinds, *[5] * spare])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(words.index("<|end|>"))
    writer.add_bos_token_id(words.index("<|start|>"))
    if pads:
        writer.add_pad_token_id(words.index("<|end|>"))
    writer.add_chat_template(TEMPLATE)
