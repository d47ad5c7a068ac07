"""Input files for llama.cpp: a random-weight model with a shape's attention, and a saved sequence.

In: a shape and layers, or a KV cache setting. Out: a GGUF file, or the bytes that `llama_state_seq_set_data` accepts,
so that a long context needs no prefill. Little-endian, without padding:

    header      depends on the version; may be empty
    streams u32 = 1, tokens u32
    per token   position i32, sequences u32 = 1, sequence i32 = 0
    transposed  u32: 1 where V is [width, tokens], as it is without flash attention
    layers u32
    per layer   K  type i32, bytes of a row u64, rows
    per layer   V  type i32, bytes of a row u64, rows; transposed: type i32, bytes of an element u32, width u32, columns
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from farkv.bench.shapes import ModelShape

# ggml's type numbers.
F16, Q8_0 = 1, 8
# Everything but attention is small: its time is subtracted, and a smaller time leaves less noise. The head dimension is
# set explicitly, so attention has its true size despite the narrow residual stream.
HIDDEN = 512
MLP = 512
VOCABULARY = 256
LONGEST = 1 << 20
# Random records repeat after this many tokens; that does not affect the timing.
BLOCK_TOKENS = 4096


class KVSetting(NamedTuple):
    """The storage types of K and V in llama.cpp, and whether flash attention reads them."""

    name: str
    type_k: int
    type_v: int
    flash: bool


SETTINGS = (
    KVSetting("f16", F16, F16, flash=False),
    KVSetting("q8_0 K, f16 V", Q8_0, F16, flash=False),
    KVSetting("f16, flash attention", F16, F16, flash=True),
    KVSetting("q8_0, flash attention", Q8_0, Q8_0, flash=True),
)


def list_tensors(shape: ModelShape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's name and shape, the contiguous dimension last."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = {"attn_norm": (HIDDEN,), "attn_q": (queries, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN),
             "attn_output": (HIDDEN, queries), "ffn_norm": (HIDDEN,), "ffn_gate": (MLP, HIDDEN),
             "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP)}  # fmt: skip
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    yield "output.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        yield from ((f"blk.{layer}.{name}.weight", size) for name, size in block.items())


def write_model(path: Path, shape: ModelShape, layers: int, seed: int = 0) -> None:
    """Write a llama model without a tokenizer: matrices have variance 1 / (contiguous dimension), norms are ones.

    Cost: about 2 · HIDDEN · (2 · heads + 2 · kv_heads) · head_dim bytes of memory per layer until the file is written:
    10 MiB for 32 + 8 heads of 128.
    """
    from gguf import GGUFWriter

    writer, rng = GGUFWriter(path, "llama"), np.random.default_rng(seed)
    writer.add_name(f"random weights, attention of {shape.name}")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, size in list_tensors(shape, layers):
        # llama.cpp requires norms in single precision.
        random = len(size) > 1
        values = rng.standard_normal(size, dtype=np.float32) / np.sqrt(size[-1], dtype=np.float32) if random else None
        writer.add_tensor(name, np.ones(size, np.float32) if values is None else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode_rows(kind: int, values: np.ndarray) -> np.ndarray:
    """Encode [tokens, width] floats in a ggml type; return uint8 [tokens, bytes of a row]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(values.astype(np.float32), GGMLQuantizationType(kind)).view(np.uint8)


class StateLayout(NamedTuple):
    """The parameters that determine the bytes of a saved state.

    Args:
        width: KV heads times head dimension.
        header: the bytes that this version of llama.cpp writes first.
    """

    setting: KVSetting
    layers: int
    tokens: int
    width: int
    header: bytes = b""

    def row_bytes(self, kind: int) -> int:
        """Return the bytes of one token's K or V in one layer."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        group, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return self.width // group * n_bytes


def build_state(layout: StateLayout, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return a saved sequence at positions 0, 1, ... as uint8.

    Args:
        keys: for each layer uint8 [tokens, row bytes].
        values: the same; without flash attention, half precision [width, tokens].

    Cost: one write of the KV cache's bytes.
    """
    setting, tokens = layout.setting, layout.tokens
    cells = np.zeros((tokens, 3), dtype="<i4")
    cells[:, 0], cells[:, 1] = np.arange(tokens), 1
    k_head = struct.pack("<iQ", setting.type_k, layout.row_bytes(setting.type_k))
    v_head = struct.pack("<iII", setting.type_v, 2, layout.width)
    if setting.flash:
        v_head = struct.pack("<iQ", setting.type_v, layout.row_bytes(setting.type_v))
    parts = [layout.header, struct.pack("<II", 1, tokens), cells, struct.pack("<II", not setting.flash, len(keys))]
    for head, rows in ((k_head, keys), (v_head, values)):
        parts += [part for one in rows for part in (head, one)]
    return np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in parts])


def draw_state(layout: StateLayout, seed: int = 0) -> np.ndarray:
    """Return a saved sequence of normally distributed K and V, the same in every layer."""
    setting, tokens = layout.setting, layout.tokens
    order = np.arange(tokens) % BLOCK_TOKENS
    size = (2, min(tokens, BLOCK_TOKENS), layout.width)
    k, v = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    k = encode_rows(setting.type_k, k)[order]
    # The transposed V repeats along columns.
    v = encode_rows(setting.type_v, v)[order] if setting.flash else v.T.astype("<f2").take(order, axis=1)
    return build_state(layout, [k] * layout.layers, [v] * layout.layers)
