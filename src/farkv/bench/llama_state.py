"""A KV cache as llama.cpp takes it back from a saved sequence, so that a long context needs no prompt's pass.

In: K and V of every layer. Out: the bytes that `llama_state_seq_set_data` accepts. Little-endian, without padding:

    header      of this version's own, if any
    streams u32 = 1, tokens u32
    per token   position i32, sequences u32 = 1, sequence i32 = 0
    transposed  u32: 1 where V lies [width, tokens], as it does without flash attention
    layers u32
    per layer   K  type i32, bytes of a row u64, rows
    per layer   V  type i32, bytes of a row u64, rows; transposed: type i32, bytes of an element u32, width u32, columns
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# ggml's numbers.
F16, Q8_0 = 1, 8
# q8_0: 32 signed bytes behind one half-precision scale.
GROUP = 32
Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (GROUP,))])

Bytes = np.ndarray


class KVSetting(NamedTuple):
    """How llama.cpp keeps K and V, and which attention reads them."""

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


def count_bytes(kind: int, elements: int) -> int:
    """Return the bytes of a row: 2 per element, or 34 per 32."""
    return elements * 2 if kind == F16 else elements // GROUP * Q8_BLOCK.itemsize


def encode_rows(kind: int, values: np.ndarray) -> Bytes:
    """Return rows in a cache's type: rounded to half precision, or q = round(x / s) with s = max|x| / 127 per 32.

    Args:
        values: [tokens, width], floating point; for q8_0 the width is a multiple of 32.

    Returns:
        [tokens, bytes of a row], uint8.
    """
    tokens, width = values.shape
    if kind == F16:
        return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)
    groups = values.astype(np.float32).reshape(tokens, width // GROUP, GROUP)
    scale = np.abs(groups).max(-1) / 127
    blocks = np.empty((tokens, width // GROUP), dtype=Q8_BLOCK)
    blocks["scale"] = scale
    blocks["values"] = np.rint(groups / np.where(scale == 0, 1, scale)[..., None])
    return blocks.view(np.uint8)


class StateForm(NamedTuple):
    """What decides the bytes of a state.

    Args:
        width: KV heads times head dimension.
        header: what this llama.cpp writes in front.
    """

    setting: KVSetting
    layers: int
    tokens: int
    width: int
    header: bytes = b""

    @property
    def k_row_bytes(self) -> int:
        """Return the bytes of one token's K in one layer."""
        return count_bytes(self.setting.type_k, self.width)

    @property
    def v_row_bytes(self) -> int:
        """Return the bytes of one token's V in one layer."""
        return count_bytes(self.setting.type_v, self.width)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all of it."""
        rows = self.tokens * (self.k_row_bytes + self.v_row_bytes)
        return len(self.header) + 8 + 12 * self.tokens + 8 + self.layers * (12 + 12 + rows)


# Writes K or V of a layer where it belongs: uint8 [tokens, row bytes]; V without flash attention: half [width, tokens].
Fill = Callable[[int, np.ndarray], None]


def build_state(form: StateForm, fill_k: Fill, fill_v: Fill) -> Bytes:
    """Return a sequence at positions 0, 1, ...

    Cost: the bytes of the KV cache, written once.
    """
    setting, tokens = form.setting, form.tokens
    state = np.empty(form.n_bytes, dtype=np.uint8)
    end = 0

    def take(n_bytes: int) -> Bytes:
        nonlocal end
        end += n_bytes
        return state[end - n_bytes : end]

    def write(data: bytes) -> None:
        take(len(data))[:] = np.frombuffer(data, dtype=np.uint8)

    cells = np.zeros((tokens, 3), dtype="<i4")
    cells[:, 0], cells[:, 1] = np.arange(tokens), 1
    write(form.header + struct.pack("<II", 1, tokens) + cells.tobytes())
    write(struct.pack("<II", int(not setting.flash), form.layers))
    for layer in range(form.layers):
        write(struct.pack("<iQ", setting.type_k, form.k_row_bytes))
        fill_k(layer, take(tokens * form.k_row_bytes).reshape(tokens, -1))
    for layer in range(form.layers):
        if setting.flash:
            write(struct.pack("<iQ", setting.type_v, form.v_row_bytes))
            fill_v(layer, take(tokens * form.v_row_bytes).reshape(tokens, -1))
        else:
            write(struct.pack("<iII", setting.type_v, 2, form.width))
            fill_v(layer, take(tokens * form.v_row_bytes).view("<f2").reshape(form.width, tokens))
    assert end == state.size
    return state


def repeat(block: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with copies of `block`, side by side along the last dimension."""
    step = block.shape[-1]
    for start in range(0, out.shape[-1], step):
        part = out[..., start : start + step]
        part[:] = block[..., : part.shape[-1]]


def draw_state(form: StateForm, *, block_tokens: int = 4096, seed: int = 0) -> Bytes:
    """Return a sequence of normal random K and V; they repeat after `block_tokens` tokens, which no timing sees.

    Cost: the bytes of the KV cache, written once.
    """
    size = (2, min(form.tokens, block_tokens), form.width)
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    k, v = encode_rows(form.setting.type_k, values[0]), encode_rows(form.setting.type_v, values[1])
    columns = np.ascontiguousarray(values[1].T, dtype="<f2")

    def fill_rows(block: Bytes, out: Bytes) -> None:
        repeat(block.reshape(-1), out.reshape(-1))

    def fill_v(layer: int, out: np.ndarray) -> None:
        if form.setting.flash:
            fill_rows(v, out)
        else:
            repeat(columns, out)

    return build_state(form, lambda layer, out: fill_rows(k, out), fill_v)
