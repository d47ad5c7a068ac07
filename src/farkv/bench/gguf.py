"""A model file for llama.cpp: random weights around the attention of a shape.

In: a shape and a number of layers. Out: a GGUF file (version 3), half-precision matrices, single-precision norms.

    header   "GGUF", version, number of tensors, number of fields
    fields   name, type, value
    tensors  name, dimensions (the contiguous one first), type, offset into the data
    data     each tensor from a multiple of 32 bytes on
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from farkv.bench.shapes import ModelShape

VERSION = 3
ALIGNMENT = 32
# The file's numbers for types of fields and of tensors.
UINT32, FLOAT32, STRING = 4, 6, 8
F32, F16 = 0, 1
# What is not attention is small: its time is subtracted, and the less it is, the less noise it leaves. The head
# dimension is a field of its own, so the attention has its true size behind a narrow residual stream.
HIDDEN = 512
MLP = 512
VOCABULARY = 256
LONGEST = 1 << 20

Field = str | int | float


class TensorSpec(NamedTuple):
    """One tensor of the file; `size` in the file's order, the contiguous dimension first."""

    name: str
    size: tuple[int, ...]

    @property
    def kind(self) -> int:
        """Return the type's number: norms are single precision, as llama.cpp wants them."""
        return F32 if len(self.size) == 1 else F16

    @property
    def n_bytes(self) -> int:
        """Return the bytes of its data, without what aligns the next one."""
        return int(np.prod(self.size)) * (4 if self.kind == F32 else 2)


def list_fields(shape: ModelShape, layers: int) -> dict[str, Field]:
    """Return what llama.cpp must know of the model besides its tensors; it has no tokenizer."""
    return {
        "general.architecture": "llama",
        "general.name": f"random weights, attention of {shape.name}",
        "tokenizer.ggml.model": "none",
        "llama.vocab_size": VOCABULARY,
        "llama.context_length": LONGEST,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": layers,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": 500000.0,
    }


def list_tensors(shape: ModelShape, layers: int) -> Iterator[TensorSpec]:
    """Yield the tensors in the order of their data."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield TensorSpec("token_embd.weight", (HIDDEN, VOCABULARY))
    yield TensorSpec("output_norm.weight", (HIDDEN,))
    yield TensorSpec("output.weight", (HIDDEN, VOCABULARY))
    for layer in range(layers):
        for name, size in (
            ("attn_norm", (HIDDEN,)),
            ("attn_q", (HIDDEN, queries)),
            ("attn_k", (HIDDEN, keys)),
            ("attn_v", (HIDDEN, keys)),
            ("attn_output", (queries, HIDDEN)),
            ("ffn_norm", (HIDDEN,)),
            ("ffn_gate", (HIDDEN, MLP)),
            ("ffn_up", (HIDDEN, MLP)),
            ("ffn_down", (MLP, HIDDEN)),
        ):
            yield TensorSpec(f"blk.{layer}.{name}.weight", size)


def align(n_bytes: int) -> int:
    """Round up to the file's alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def encode_text(text: str) -> bytes:
    """Return length and UTF-8 bytes."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def encode_field(name: str, value: Field) -> bytes:
    """Return one field: name, type, value."""
    if isinstance(value, str):
        return encode_text(name) + struct.pack("<I", STRING) + encode_text(value)
    if isinstance(value, float):
        return encode_text(name) + struct.pack("<If", FLOAT32, value)
    return encode_text(name) + struct.pack("<II", UINT32, value)


def encode_header(fields: dict[str, Field], tensors: list[TensorSpec]) -> bytes:
    """Return all that stands before the data, aligned."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    parts += [encode_field(name, value) for name, value in fields.items()]
    offset = 0
    for tensor in tensors:
        n = len(tensor.size)
        parts.append(encode_text(tensor.name))
        parts.append(struct.pack(f"<I{n}QIQ", n, *tensor.size, tensor.kind, offset))
        offset += align(tensor.n_bytes)
    header = b"".join(parts)
    return header.ljust(align(len(header)), b"\0")


def write_tensor(file: BinaryIO, tensor: TensorSpec, rng: np.random.Generator) -> None:
    """Write ones, or normal numbers of variance 1 / (contiguous dimension), and zeros up to the alignment."""
    if tensor.kind == F32:
        file.write(np.ones(tensor.size, dtype="<f4").tobytes())
    else:
        values = rng.standard_normal(tensor.size[::-1], dtype=np.float32) / np.sqrt(tensor.size[0])
        file.write(values.astype("<f2").tobytes())
    file.write(bytes(align(tensor.n_bytes) - tensor.n_bytes))


def write_gguf(path: Path, shape: ModelShape, layers: int, seed: int = 0) -> None:
    """Write a llama model whose attention has the shape's heads and head dimension.

    Cost: about 2 · HIDDEN · (2 · heads + 2 · kv_heads) · head_dim bytes per layer: 10 MiB for 32 + 8 heads of 128.
    """
    tensors, rng = list(list_tensors(shape, layers)), np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(encode_header(list_fields(shape, layers), tensors))
        for tensor in tensors:
            write_tensor(file, tensor, rng)
