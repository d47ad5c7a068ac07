"""Decode: every method computes the same attention; rows say what was read, and how near to the floor it came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from farkv.bench import decode
from farkv.bench.case import Bandwidth, Case, Traffic, find_floor
from farkv.bench.decode import measure_decode
from farkv.bench.fill import KVSource
from farkv.bench.methods import CODED, DEFAULT, METHODS, Settings, count_bytes, make_runners
from farkv.bench.ours import DenseNativeRunner, InfiniGenRunner
from farkv.bench.peers import HuggingFaceRunner
from farkv.errors import CapacityError, ConfigError
from farkv.kernels.native import load_native
from tests.bench.plain import TINY, PlainNative, attend_all

SMALL: dict[str, Any] = {"buffer_bytes": 1 << 20, "block_rows": 1 << 10}


def settings(*methods: str, **more: Any) -> Settings:
    return Settings(TINY, (256,), methods or DEFAULT, **{"rounds": 1, "layers": 2, **SMALL, **more})


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> PlainNative:
    native = PlainNative()
    monkeypatch.setattr(decode, "load_native", lambda: native)
    return native


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("load", [PlainNative, load_native], ids=["plain", "native"])
def test_every_method_computes_the_same_attention(load: Any, batch: int) -> None:
    kernels = load()
    if kernels is None:
        pytest.skip("no native kernel was built here")
    asked = settings(*METHODS, batch=batch, fraction=1.0)
    source = KVSource(TINY, batch, torch.device("cpu"), rows=1 << 10)
    k, v = source.draw_kv(1, 0, 257)
    expected = attend_all(source.draw_q(1, 256, 1), k, v, TINY.scaling)
    for runner in make_runners(asked, 256, kernels):
        for layer in range(2):
            out = runner.attend(layer)
        error = float((out.double() - expected).abs().max())
        # Probabilities and outputs of two and eight bits of mantissa less than float32's; coded records are coarser.
        least = 1e-5 if runner.name.endswith("fp32") else 0.3 if runner.name in CODED else 0.01
        assert error < least * float(expected.abs().max()), runner.name


def test_a_step_leaves_every_cache_as_long_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farkv.bench.ours.MOST_GROWTH", 4)
    for runner in make_runners(settings(*METHODS), 256, PlainNative()):
        for _ in range(4):
            runner.step(0)
            runner.step(1)
        runner.restore()
        if isinstance(runner, InfiniGenRunner):
            assert runner.engine.store.length(0) == 256 == runner.engine.store.length(1)
        elif isinstance(runner, HuggingFaceRunner):
            assert runner.cache.get_seq_length() == 256


def test_rows_of_all_methods(native: PlainNative) -> None:
    report = measure_decode(settings(*METHODS)).to_dict()
    assert [row["method"] for row in report["rows"]] == list(METHODS)
    for row in report["rows"]:
        assert (row["context"], row["batch"]) == (256, 1)
        assert 0 < row["ms_low"] <= row["ms_per_layer"] <= row["ms_high"]
        assert row["floor_ms"] > 0
        # Not below 100: the bandwidths are invented, and a machine may be faster than they.
        expected = 100 * row["floor_ms"] / row["ms_per_layer"]
        assert row["floor_percent"] == pytest.approx(expected, rel=0.02, abs=0.1)
        assert row["read_fraction"] <= 0.05 if row["method"].startswith("infinigen") else row["read_fraction"] == 1
    dense, ours = report["rows"][1], report["rows"][0]
    # 2 heads * 256 tokens * 64 bytes at 2 GB/s.
    assert dense["floor_ms"] == pytest.approx(1e3 * 32768 / 2e9, rel=1e-3)
    assert ours["floor_ms"] < dense["floor_ms"]
    assert 0 < ours["index_fraction"] <= 0.1
    assert report["machine"]["read_gb_per_s"] == 2.0
    assert report["machine"]["gather_gb_per_s"] == 1.0
    assert report["settings"]["shape"] == "tiny"


def test_the_floor_is_the_index_in_sequence_and_the_records_in_rows() -> None:
    bandwidth = Bandwidth(2e9, {512: 1e9}.__getitem__)
    assert find_floor(Traffic(0.05, 4e6, 3e6, 512), bandwidth) == pytest.approx(2e-3 + 3e-3)
    assert find_floor(Traffic(1.0, 4e6), bandwidth) == pytest.approx(2e-3)


def test_without_a_native_kernel_the_default_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "load_native", lambda: None)
    monkeypatch.setattr("farkv.bench.machine.load_native", lambda: None)
    report = measure_decode(settings(rounds=1))
    assert [row.method for row in report.rows] == [name for name in DEFAULT if name != "dense-native"]
    assert all(row.floor_percent is None for row in report.rows)
    assert report.machine["read_gb_per_s"] is None
    assert report.machine["kernel"] == "torch"
    assert "dense-native is skipped" in report.notes[0]
    with pytest.raises(ConfigError, match="dense-native: needs the native kernel"):
        measure_decode(settings("dense-native"))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--methods: .*got 'fast'"):
        settings("fast")
    with pytest.raises(ConfigError, match=r"--peer: .*got 'other'"):
        settings(peers=("other",))


def test_a_peer_that_is_not_installed_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    monkeypatch.setattr(decode, "measure_context", lambda *args: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        measure_decode(settings("infinigen", peers=("llama.cpp",)))


def test_a_peer_gets_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farkv.bench.llama_cpp.require_llama_cpp", lambda: None)
    monkeypatch.setattr("farkv.bench.llama_cpp.measure_llama_cpp", lambda *args: [0.003, 0.001, 0.002])
    asked = settings("infinigen", peers=("llama.cpp",), rounds=1)
    row = measure_decode(asked).rows[-1]
    assert (row.method, row.ms_per_layer, row.read_fraction, row.floor_percent) == ("llama.cpp", 2.0, 1.0, None)
    with pytest.raises(ConfigError, match="--batch 1"):
        measure_decode(replace(asked, batch=2))


def test_bytes_are_counted_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(*METHODS)
    held = 0
    seen: set[int] = set()
    for runner in make_runners(asked, 256, PlainNative()):
        if isinstance(runner, InfiniGenRunner):
            held += runner.engine.store.host.used
            continue
        tensors = runner.rows if isinstance(runner, DenseNativeRunner) else [*runner.held.k, *runner.held.v]
        held += sum(t.nbytes for t in tensors if t.data_ptr() not in seen)
        seen |= {t.data_ptr() for t in tensors}
    # A tiny context's room to grow is no part of the estimate.
    grown = 2 * 3 * TINY.layer_bytes(128)
    assert held - grown <= count_bytes(asked, 256) <= 3 * held + SMALL["buffer_bytes"]
    monkeypatch.setattr("farkv.bench.fill.find_available_bytes", lambda: 0)
    with pytest.raises(CapacityError, match="a context of 256 tokens"):
        measure_decode(settings("infinigen"))


def test_layers_are_as_many_as_no_cache_holds() -> None:
    shape = replace(TINY, layers=32, kv_heads=8, head_dim=128)
    assert [Case(shape, n).fast_layers for n in (8 << 10, 32 << 10, 128 << 10, 1 << 20)] == [32, 8, 2, 2]
    assert [Case(shape, n).slow_layers for n in (1 << 10, 32 << 10)] == [32, 2]
    assert Case(shape, 1 << 20, layers=1).fast_layers == 1
