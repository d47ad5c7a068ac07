import numpy as np
import pytest

from farkv.bench.llama_state import (
    F16,
    Q8_0,
    Q8_BLOCK,
    SETTINGS,
    StateForm,
    build_state,
    count_bytes,
    draw_state,
    encode_rows,
    repeat,
)

WIDTH = 64


def decode_q8(rows):
    blocks = np.ascontiguousarray(rows).view(Q8_BLOCK)
    values = blocks["scale"].astype(np.float64)[..., None] * blocks["values"]
    return values.reshape(len(rows), -1)


def test_half_precision_rows_are_rounded():
    values = np.random.default_rng(0).standard_normal((5, WIDTH))
    rows = encode_rows(F16, values)
    assert rows.shape == (5, count_bytes(F16, WIDTH)) == (5, 128)
    assert (rows.view("<f2") == values.astype(np.float16)).all()


def test_q8_rows_are_within_half_a_step():
    values = np.random.default_rng(0).standard_normal((50, WIDTH)) * np.logspace(-3, 3, 50)[:, None]
    rows = encode_rows(Q8_0, values)
    assert rows.shape == (50, count_bytes(Q8_0, WIDTH)) == (50, 68)
    step = np.repeat(np.abs(values.reshape(50, 2, 32)).max(-1) / 127, 32, axis=1)
    # Half a step, and 127 times the rounding of the half-precision scale (a subnormal one is rounded to 2^-25).
    error = 0.5 * step + 127 * np.maximum(step * 2.0**-11, 2.0**-25)
    assert (np.abs(decode_q8(rows) - values) <= error * 1.001).all()


def test_q8_of_zeros_is_zero():
    assert (decode_q8(encode_rows(Q8_0, np.zeros((2, WIDTH)))) == 0).all()


@pytest.mark.parametrize("step", [1, 3, 4, 7, 20])
def test_repeat_goes_on_to_the_end(step):
    block, out = np.arange(2 * step).reshape(2, step), np.full((2, 11), -1)
    repeat(block, out)
    assert (out == block[:, np.arange(11) % step]).all()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_state_is_as_long_as_its_form_and_its_layers_lie_apart(setting):
    form = StateForm(setting, 3, 5, WIDTH, b"HEAD")
    asked = []

    def fill(mark):
        def write(layer, out):
            asked.append((mark, layer, out.shape))
            out[:] = mark + layer

        return write

    state = build_state(form, fill(10), fill(20))
    assert state.size == form.n_bytes
    assert bytes(state[:12]) == b"HEAD" + bytes([1, 0, 0, 0, 5, 0, 0, 0])
    assert state[12:72].view("<i4").reshape(5, 3).tolist() == [[i, 1, 0] for i in range(5)]
    assert state[72:80].view("<u4").tolist() == [int(not setting.flash), 3]
    v_shape = (5, form.v_row_bytes) if setting.flash else (WIDTH, 5)
    assert asked == [(10, i, (5, form.k_row_bytes)) for i in range(3)] + [(20, i, v_shape) for i in range(3)]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_drawn_records_are_finite_and_every_token_has_one(setting):
    form = StateForm(setting, 1, 10, WIDTH)
    state = draw_state(form, block_tokens=4)
    k = state[8 + 120 + 8 + 12 :][: 10 * form.k_row_bytes].reshape(10, -1)
    v = state[-10 * form.v_row_bytes :]
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
