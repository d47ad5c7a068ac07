import numpy as np
import pytest

from farkv.bench import llama_files
from farkv.bench.llama_files import (
    F16,
    HIDDEN,
    MLP,
    Q8_0,
    SETTINGS,
    VOCABULARY,
    StateLayout,
    build_state,
    draw_state,
    encode_rows,
    list_tensors,
    write_model,
)
from farkv.bench.shapes import SHAPES, ModelShape

pytest.importorskip("gguf", reason="llama.cpp's files need the package gguf: pip install 'farkv[peer]'")

TINY = ModelShape("tiny", "llama", 2, 64, 4, 2, 32, 64)
WIDTH = 64
# q8_0: 32 signed bytes behind one half-precision scale.
Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from gguf import GGUFReader

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(path, TINY, 2)
    return GGUFReader(path)


def test_the_fields_are_the_shapes_attention(written):
    fields = {name: field.contents() for name, field in written.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.attention.key_length"] == fields["llama.attention.value_length"] == 32
    assert fields["llama.rope.dimension_count"] == 32
    assert fields["llama.block_count"] == 2
    assert fields["llama.rope.freq_base"] == 500000.0
    assert fields["tokenizer.ggml.model"] == "none"


def test_every_tensor_has_its_size_and_matrices_keep_that_of_what_they_multiply(written):
    tensors = {tensor.name: tensor for tensor in written.tensors}
    # The file names the contiguous dimension first.
    assert {name: tuple(t.shape[::-1]) for name, t in tensors.items()} == dict(list_tensors(TINY, 2))
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [HIDDEN, 64]
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [MLP, HIDDEN]
    values = tensors["blk.0.attn_output.weight"].data.astype(np.float64)
    assert np.isfinite(values).all()
    assert values.var() * values.shape[-1] == pytest.approx(1, abs=0.05)
    assert tensors["blk.0.attn_output.weight"].data.dtype == np.float16
    norm = tensors["output_norm.weight"].data
    assert norm.dtype == np.float32
    assert (norm == 1).all()


def test_layers_cost_what_the_docstring_says():
    sizes = dict(list_tensors(SHAPES["llama3-8b"], 1))
    per_layer = sum(2 * np.prod(size) for name, size in sizes.items() if name.startswith("blk.0.attn"))
    assert per_layer == pytest.approx(2 * HIDDEN * (2 * 32 + 2 * 8) * 128, rel=0.01)
    assert len(dict(list_tensors(TINY, 2))) == 3 + 2 * 9
    assert next(list_tensors(TINY, 2))[1] == (VOCABULARY, HIDDEN)


def decode_q8(rows):
    blocks = np.ascontiguousarray(rows).view(Q8_BLOCK)
    values = blocks["scale"].astype(np.float64)[..., None] * blocks["values"]
    return values.reshape(len(rows), -1)


def count_row(kind):
    return StateLayout(SETTINGS[0], 1, 1, WIDTH).row_bytes(kind)


def test_half_precision_rows_are_rounded():
    values = np.random.default_rng(0).standard_normal((5, WIDTH))
    rows = encode_rows(F16, values)
    assert rows.shape == (5, count_row(F16)) == (5, 128)
    assert (rows.view("<f2") == values.astype(np.float16)).all()


def test_q8_rows_are_within_half_a_step():
    values = np.random.default_rng(0).standard_normal((50, WIDTH)) * np.logspace(-3, 3, 50)[:, None]
    rows = encode_rows(Q8_0, values)
    assert rows.shape == (50, count_row(Q8_0)) == (50, 68)
    step = np.repeat(np.abs(values.reshape(50, 2, 32)).max(-1) / 127, 32, axis=1)
    # Half a step, and 127 times the rounding of the half-precision scale (a subnormal one is rounded to 2^-25).
    error = 0.5 * step + 127 * np.maximum(step * 2.0**-11, 2.0**-25)
    assert (np.abs(decode_q8(rows) - values) <= error * 1.001).all()


def test_q8_of_zeros_is_zero():
    assert (decode_q8(encode_rows(Q8_0, np.zeros((2, WIDTH)))) == 0).all()


@every_setting
def test_layers_lie_apart_where_the_description_says(setting):
    layout = StateLayout(setting, 3, 5, WIDTH, b"HEAD")
    k_row, v_row = layout.row_bytes(setting.type_k), layout.row_bytes(setting.type_v)
    keys = [np.full((5, k_row), 10 + i, np.uint8) for i in range(3)]
    v_size = (5, v_row) if setting.flash else (2 * WIDTH, 5)
    values = [np.full(v_size, 20 + i, np.uint8) for i in range(3)]
    state = build_state(layout, keys, [v if setting.flash else v.reshape(WIDTH, -1).view("<f2") for v in values])
    assert bytes(state[:12]) == b"HEAD" + bytes([1, 0, 0, 0, 5, 0, 0, 0])
    assert state[12:72].view("<i4").reshape(5, 3).tolist() == [[i, 1, 0] for i in range(5)]
    assert state[72:80].view("<u4").tolist() == [int(not setting.flash), 3]
    at = 80
    for i, (kind, row, mark) in enumerate([(setting.type_k, k_row, 10)] * 3 + [(setting.type_v, v_row, 20)] * 3):
        assert state[at : at + 4].view("<i4") == kind
        if i < 3 or setting.flash:
            assert state[at + 4 : at + 12].view("<u8") == row
        else:
            assert state[at + 4 : at + 12].view("<u4").tolist() == [2, WIDTH]
        assert (state[at + 12 : at + 12 + 5 * row] == mark + i % 3).all()
        at += 12 + 5 * row
    assert state.size == at


@every_setting
def test_drawn_records_are_finite_and_every_token_has_one(setting, monkeypatch):
    monkeypatch.setattr(llama_files, "BLOCK_TOKENS", 4)
    layout = StateLayout(setting, 1, 10, WIDTH)
    state = draw_state(layout)
    k = state[8 + 120 + 8 + 12 :][: 10 * layout.row_bytes(setting.type_k)].reshape(10, -1)
    v = state[-10 * layout.row_bytes(setting.type_v) :]
    k = k.view("<f2").astype(np.float64) if setting.type_k == F16 else decode_q8(k)
    if setting.type_v == Q8_0:
        v = decode_q8(v.reshape(10, -1))
    else:
        v = v.view("<f2").astype(np.float64).reshape((10, WIDTH) if setting.flash else (WIDTH, 10))
        v = v if setting.flash else v.T
    for values in (k, v):
        assert np.isfinite(values).all()
        assert values.std() == pytest.approx(1, abs=0.2)
        assert (values == values[np.arange(10) % 4]).all()
        assert len(np.unique(values, axis=0)) == 4
    assert not (k == v).all()
