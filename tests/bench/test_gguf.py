import struct

import numpy as np
import pytest

from farkv.bench.gguf import HIDDEN, MLP, VOCABULARY, align, list_tensors, write_gguf
from farkv.bench.shapes import SHAPES, ModelShape

TINY = ModelShape("tiny", "llama", 2, 64, 4, 2, 32, 64)


class Reader:
    """Reads the format by its own description, independently of what writes it."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    def text(self):
        return bytes(self.take(f"{self.take('Q')}s")).decode()


@pytest.fixture
def written(tmp_path):
    write_gguf(tmp_path / "model.gguf", TINY, 2)
    return (tmp_path / "model.gguf").read_bytes()


def read(data):
    reader = Reader(data)
    assert reader.take("4s") == b"GGUF"
    version, n_tensors, n_fields = reader.take("IQQ")
    assert version == 3
    fields = {}
    for _ in range(n_fields):
        name, kind = reader.text(), reader.take("I")
        fields[name] = reader.text() if kind == 8 else reader.take({4: "I", 6: "f"}[kind])
    tensors = {}
    for _ in range(n_tensors):
        name, n = reader.text(), reader.take("I")
        size = [reader.take("Q") for _ in range(n)]
        tensors[name] = (size, *reader.take("IQ"))
    return fields, tensors, align(reader.at)


def test_the_fields_are_the_shapes_attention(written):
    fields, _, _ = read(written)
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.attention.key_length"] == fields["llama.attention.value_length"] == 32
    assert fields["llama.block_count"] == 2
    assert fields["llama.rope.freq_base"] == 500000.0


def test_every_tensor_lies_behind_the_one_before_and_the_file_ends_with_the_last(written):
    _, tensors, start = read(written)
    end = 0
    for size, kind, offset in tensors.values():
        assert offset == end
        assert (start + offset) % 32 == 0
        assert kind == (0 if len(size) == 1 else 1)
        end = offset + align(int(np.prod(size)) * (4 if kind == 0 else 2))
    assert start + end == len(written)
    assert tensors["blk.1.attn_k.weight"][0] == [HIDDEN, 64]
    assert tensors["blk.1.ffn_down.weight"][0] == [MLP, HIDDEN]


def test_matrices_keep_the_size_of_what_they_multiply(written):
    _, tensors, start = read(written)
    size, _, offset = tensors["blk.0.attn_output.weight"]
    values = np.frombuffer(written, "<f2", int(np.prod(size)), start + offset).astype(np.float64)
    assert np.isfinite(values).all()
    assert values.var() * size[0] == pytest.approx(1, abs=0.05)
    norm = np.frombuffer(written, "<f4", HIDDEN, start + tensors["output_norm.weight"][2])
    assert (norm == 1).all()


def test_layers_cost_what_the_docstring_says():
    per_layer = sum(t.n_bytes for t in list_tensors(SHAPES["llama3-8b"], 1) if t.name.startswith("blk.0.attn"))
    assert per_layer == pytest.approx(2 * HIDDEN * (2 * 32 + 2 * 8) * 128, rel=0.01)
    names = [t.name for t in list_tensors(TINY, 2)]
    assert len(names) == len(set(names)) == 3 + 2 * 9
    assert next(list_tensors(TINY, 2)).size == (HIDDEN, VOCABULARY)
