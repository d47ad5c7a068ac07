"""Whole models over caches that were filled directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import farkv
from farkv.bench import e2e
from farkv.bench.e2e import (
    METHODS,
    ModelRunner,
    ModelSettings,
    build_model,
    draw_model,
    fill_far,
    fill_plain,
    find_growth,
    measure_model,
)
from farkv.bench.fill import KVSource
from farkv.bench.llama_cpp import LlamaSteps, load_file
from farkv.bench.llama_files import F16, SETTINGS, KVSetting
from farkv.bench.models import make_model, share_weights
from farkv.bench.prefill import DTYPES
from farkv.bench.real import describe_shape, load_real, read_shape
from farkv.bench.report import Row
from farkv.bench.shapes import ModelShape
from farkv.errors import ConfigError
from farkv.hf.packed import PackedLinear
from tests import models as tiny_models
from tests.bench.plain import TINY
from tests.gguf_files import LAYERS, write_gguf

ASKED = ModelSettings(TINY, (128, 256), 2, METHODS, rounds=1)


def test_both_caches_hold_the_same_context() -> None:
    plain = make_model(TINY, 2, 512, torch.bfloat16)
    source = KVSource(TINY, 1, torch.device("cpu"), rows=1 << 10)
    ids = torch.tensor([[7]])
    theirs = plain(input_ids=ids, past_key_values=fill_plain(ASKED, 128, source)).logits
    with farkv.attach(share_weights(plain), farkv.InfiniGen(fraction=1.0), profile=False) as far:
        cache = fill_far(ASKED, 128, source, far)
        assert cache.get_seq_length() == 128
        ours = far.model(input_ids=ids, past_key_values=cache).logits
    assert float((ours - theirs).abs().max()) <= 2**-6 * float(theirs.abs().max())


def test_a_runner_takes_back_what_it_read() -> None:
    plain = make_model(TINY, 2, 512, torch.bfloat16)
    cache = fill_plain(ASKED, 128, KVSource(TINY, 1, torch.device("cpu"), rows=1 << 10))
    runner = ModelRunner("hf-sdpa-bf16", plain, cache, 1)
    for _ in range(64):
        runner.step(0)
    assert cache.get_seq_length() == 192
    runner.restore()
    assert cache.get_seq_length() == 128


def test_rows_and_growth() -> None:
    report = measure_model(ASKED)
    rows = report.to_dict()["rows"]
    assert [(row["method"], row["context"]) for row in rows] == [(name, n) for n in (128, 256) for name in METHODS]
    for row in rows:
        assert row["ms_per_layer"] == pytest.approx(row["ms_per_token"] / 2, rel=1e-2)
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"], rel=1e-2)
        assert row["read_fraction"] <= 0.05 if row["method"] == "infinigen" else row["read_fraction"] == 1
    assert set(report.to_dict()["growth"]) == set(METHODS)
    with (console := Console(width=80)).capture() as out:
        console.print(draw_model(report))
    assert max(len(line.rstrip()) for line in out.get().splitlines()) <= 80


def test_growth_is_the_slope_between_the_ends() -> None:
    def row(method: str, context: int, ms: float) -> Row:
        return Row(method, context, 1, ms, ms, ms, ms, 1, None, more={"ms_per_token": ms})

    rows = [row(name, n, ms) for name, ends in (("infinigen", (10, 11)), ("hf-sdpa-bf16", (20, 36))) for n, ms in
            zip((1024, 9216), ends, strict=True)]  # fmt: skip
    growth = find_growth(rows)
    assert growth["hf-sdpa-bf16"]["ms_per_1k_tokens"] == pytest.approx(2.0)
    assert growth["infinigen"] == {"ms_per_1k_tokens": pytest.approx(0.125), "share": pytest.approx(1 / 16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_is_measured_in_its_own_dtype(dtype: str) -> None:
    model, shape = load_real("demo", dtype)
    assert (shape.layers, shape.heads % shape.kv_heads) == (model.config.num_hidden_layers, 0)
    assert read_shape("demo") == shape
    asked = ModelSettings(shape, (128,), shape.layers, rounds=1, dtype=dtype, model=model)
    report = measure_model(asked).to_dict()
    assert [row["method"] for row in report["rows"]] == ["infinigen", f"hf-sdpa-{DTYPES[dtype]}"]
    assert (report["settings"]["real"], report["settings"]["dtype"]) == (True, dtype)


@pytest.mark.parametrize("is_real", [True, False])
def test_packed_weights_are_measured_and_named(is_real: bool) -> None:
    model, shape = load_real("demo", "float32", "int8") if is_real else (None, TINY)
    layers = shape.layers if is_real else 2
    asked = ModelSettings(shape, (128,), layers, rounds=1, dtype="float32", weights="int8", model=model)
    measured = build_model(asked)
    assert any(isinstance(part, PackedLinear) for part in measured.modules())
    report = measure_model(replace(asked, model=measured))
    assert report.to_dict()["settings"]["weights"] == "int8"
    assert "float32, weights int8, cap" in report.title
    assert [row.method for row in report.rows] == ["infinigen", "hf-sdpa-fp32"]


def test_a_model_of_other_layers_too_is_refused() -> None:
    model = tiny_models.make_model("gemma3")
    shape = describe_shape(model.config, "gemma3")
    assert (shape.kv_heads, shape.head_dim) == (2, 8)
    with pytest.raises(ConfigError, match="sliding_attention"):
        measure_model(ModelSettings(shape, (128,), shape.layers, rounds=1, dtype="float32", model=model))


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--methods: .*got 'matmul-bf16'"):
        ModelSettings(TINY, (128,), 2, ("matmul-bf16",))


class FakeSteps:
    """llama.cpp's steps, which are read no time of."""

    name, n_layers, least_tokens = "llama.cpp", 1, 1
    opened = 0

    def __init__(self, model: object, setting: KVSetting, context: int, threads: int):
        assert (model, threads) == ("loaded", torch.get_num_threads())
        self.setting, self.context, self.grown = setting, context, 0
        type(self).opened += 1

    def step(self, layer: int) -> None:
        self.grown += 1

    def restore(self) -> None:
        self.grown = 0

    def measure(self) -> float:
        return 1.0 if self.setting is SETTINGS[2] else 2.0

    def close(self) -> None:
        assert self.grown == 0
        type(self).opened -= 1


def test_llama_cpp_takes_turns_with_its_fastest_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def load_fake(path: Path, shape: ModelShape, layers: int) -> Iterator[str]:
        assert (path.name, layers) == ("tiny.gguf", 2)
        yield "loaded"

    (path := tmp_path / "tiny.gguf").write_bytes(b"")
    monkeypatch.setattr(e2e, "load_file", load_fake)
    monkeypatch.setattr(e2e, "LlamaSteps", FakeSteps)
    report = measure_model(replace(ASKED, methods=("infinigen",), peer_file=path, rounds=2)).to_dict()
    assert [(row["method"], row["context"]) for row in report["rows"]] == [
        (name, n) for n in (128, 256) for name in ("infinigen", "llama.cpp")
    ]
    assert {row.get("kv") for row in report["rows"]} == {None, SETTINGS[2].name}
    assert report["settings"]["peers"] == ["llama.cpp"]
    assert FakeSteps.opened == 0


def test_llama_cpp_decodes_a_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'farkv[peer]'")
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    shape = read_shape(str(path))
    with load_file(path, shape, LAYERS) as model:
        # Its heads are shorter than a block of eight bits.
        for setting in (s for s in SETTINGS if s.type_k == F16):
            steps = LlamaSteps(model, setting, 256, 1)
            for _ in range(16):
                steps.step(0)
            assert len(steps.sequence) == 272
            steps.restore()
            assert len(steps.sequence) == 256
            assert steps.measure() > 0
            steps.close()
