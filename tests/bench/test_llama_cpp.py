import importlib
import math
from contextlib import contextmanager

import numpy as np
import pytest

from farkv.bench import llama_cpp as peer_module
from farkv.bench.llama_cpp import (
    BASE_TOKENS,
    LEAST_TOKENS,
    SCREEN_ROUNDS,
    LlamaPair,
    LlamaSequence,
    load_model,
    measure_llama_cpp,
    require_llama_cpp,
)
from farkv.bench.llama_files import SETTINGS, VOCABULARY, KVSetting, StateLayout, build_state, draw_state, encode_rows
from farkv.bench.shapes import ModelShape
from farkv.errors import CapacityError, ConfigError

TINY = ModelShape("tiny", "llama", 2, 64, 4, 2, 32, 64)
LAYERS, TOKENS, WIDTH = 2, 70, 64
Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)


@pytest.mark.parametrize("missing", ["llama_cpp", "gguf"])
def test_a_missing_package_is_refused_with_the_extras_name(monkeypatch, missing):
    def fail(name):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peer_module, "import_module", fail)
    with pytest.raises(ConfigError, match=rf"llama-cpp-python and gguf.*{missing}.*pip install 'farkv\[peer\]'"):
        require_llama_cpp()
    with pytest.raises(ConfigError, match="llama-cpp-python"):
        measure_llama_cpp(TINY, LAYERS, LEAST_TOKENS, 1, 1)


def test_a_short_context_is_refused():
    with pytest.raises(ConfigError, match=f"at least {LEAST_TOKENS}, got 512"):
        measure_llama_cpp(TINY, LAYERS, 512, 1, 1)


def test_what_memory_cannot_hold_is_refused_before_anything_is_made():
    with pytest.raises(CapacityError, match=r"llama\.cpp at"):
        measure_llama_cpp(TINY, LAYERS, 1 << 50, 1, 1)


def test_the_best_setting_is_measured_and_hopeless_ones_get_one_round(monkeypatch):
    times = dict(zip((setting.name for setting in SETTINGS), (3.0, 2.0, 5.0, 3.9), strict=True))
    log, opened = [], []

    class FakePair:
        def __init__(self, model, setting: KVSetting, context, threads):
            assert not opened, "two pairs in memory"
            opened.append(self)
            self.name, self.rounds = setting.name, 0

        def measure(self):
            self.rounds += 1
            return times[self.name]

        def close(self):
            opened.remove(self)
            log.append((self.name, self.rounds))

    @contextmanager
    def load_fake(shape, layers):
        yield None
        log.append("closed")

    monkeypatch.setattr(peer_module, "load_model", load_fake)
    monkeypatch.setattr(peer_module, "LlamaPair", FakePair)
    assert measure_llama_cpp(TINY, LAYERS, LEAST_TOKENS, 1, 7) == [2.0] * 7
    rounds = [SCREEN_ROUNDS, SCREEN_ROUNDS, 1, SCREEN_ROUNDS]
    names = [setting.name for setting in SETTINGS]
    assert log == [*zip(names, rounds, strict=True), (names[1], 7), "closed"]


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'farkv[peer]'")
    with load_model(TINY, LAYERS) as model:
        yield model


def open_sequence(model, setting, tokens):
    return LlamaSequence(model, setting, tokens + 1, 1)


def prefill(model, setting):
    sequence = open_sequence(model, setting, TOKENS)
    for i in range(TOKENS):
        sequence.decode(37 * i)
    return sequence


def read_logits(sequence):
    """Return the newest token's logits."""
    return np.ctypeslib.as_array(sequence.library.llama_get_logits(sequence.handle), (VOCABULARY,)).copy()


def read_kv(state, setting):
    """K and V of every layer out of a real state, by position from the end: K of all layers, then V of all layers."""
    layout = StateLayout(setting, LAYERS, TOKENS, WIDTH)
    k_bytes, v_bytes = (TOKENS * layout.row_bytes(kind) for kind in (setting.type_k, setting.type_v))
    v_start = state.size - LAYERS * (12 + v_bytes)
    k_start = v_start - LAYERS * (12 + k_bytes)
    k = [state[k_start + i * (12 + k_bytes) + 12 :][:k_bytes].reshape(TOKENS, -1) for i in range(LAYERS)]
    v = [state[v_start + i * (12 + v_bytes) + 12 :][:v_bytes] for i in range(LAYERS)]
    if setting.flash:
        return k, [one.reshape(TOKENS, -1) for one in v]
    return k, [one.view("<f2").reshape(WIDTH, TOKENS) for one in v]


@every_setting
def test_a_state_made_of_a_real_prefills_kv_is_that_prefill(model, setting):
    real, made = prefill(model, setting), open_sequence(model, setting, TOKENS)
    saved = real.save()
    k, v = read_kv(saved, setting)
    layout = made.learn_layout(TOKENS)
    state = build_state(layout, k, v)
    assert (state == saved).all()
    made.load(state, TOKENS)
    assert len(made) == len(real) == TOKENS
    real.decode(5)
    made.decode(5)
    assert (read_logits(made) == read_logits(real)).all()
    # What is loaded is what is read: other records, other logits.
    made.cut(TOKENS)
    expected = read_logits(made)
    made.load(build_state(layout, k, v[::-1]), TOKENS)
    made.decode(5)
    assert np.abs(read_logits(made) - expected).max() > 1e-3
    real.close()
    made.close()


def test_our_q8_rows_are_llama_cpps(model):
    half, eight = (prefill(model, setting) for setting in SETTINGS[:2])
    k_half, k_eight = (read_kv(one.save(), setting)[0] for one, setting in zip((half, eight), SETTINGS, strict=False))
    # Layer 0 alone: its K does not depend on how the cache is kept.
    ours = encode_rows(8, k_half[0].view("<f2").astype(np.float32)).view(Q8_BLOCK)
    theirs = np.ascontiguousarray(k_eight[0]).view(Q8_BLOCK)
    # Theirs are rounded from single precision, ours from half: 2^-11 of the scale, and one step where it tips.
    assert ours["scale"].astype(np.float64) == pytest.approx(theirs["scale"].astype(np.float64), rel=2.0**-9)
    assert np.abs(ours["values"].astype(int) - theirs["values"]).max() <= 1
    assert (ours["values"] == theirs["values"]).mean() > 0.9
    half.close()
    eight.close()


@every_setting
def test_a_filled_sequence_is_as_long_as_asked_and_stays_so(model, setting):
    pair = LlamaPair(model, setting, LEAST_TOKENS, 1)
    assert [len(sequence) for sequence, _ in pair.sequences] == [LEAST_TOKENS, BASE_TOKENS]
    assert math.isfinite(pair.measure())
    assert [len(sequence) for sequence, _ in pair.sequences] == [LEAST_TOKENS, BASE_TOKENS]
    for sequence, _ in pair.sequences:
        logits = read_logits(sequence)
        assert np.isfinite(logits).all()
        assert logits.std() > 0
    pair.close()


def test_a_state_of_another_form_is_refused(model):
    sequence = open_sequence(model, SETTINGS[0], TOKENS)
    state = draw_state(sequence.learn_layout(TOKENS))
    with pytest.raises(ConfigError, match=rf"expected it to restore {TOKENS} tokens"):
        sequence.load(state[:-1000], TOKENS)
    with pytest.raises(ConfigError, match="expected it to restore 71 tokens"):
        sequence.load(state, TOKENS + 1)
    sequence.close()


def test_a_full_sequence_refuses_one_token_more(model):
    sequence = LlamaSequence(model, SETTINGS[0], 256, 1)
    sequence.fill(256)
    with pytest.raises(ConfigError, match="decoding a token after 256"):
        sequence.decode(0)
    sequence.close()


def test_measuring_gives_one_number_per_round_and_says_nothing(capfd):
    pytest.importorskip("llama_cpp")
    seconds = measure_llama_cpp(TINY, LAYERS, LEAST_TOKENS, 1, 3)
    assert len(seconds) == 3
    assert all(math.isfinite(one) for one in seconds)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_package_is_found_by_its_own_name():
    # farkv.bench.llama_cpp does not hide it.
    library = pytest.importorskip("llama_cpp")
    assert require_llama_cpp() is importlib.import_module("llama_cpp") is library
