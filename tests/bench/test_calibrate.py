"""The crossover: from the times, and into the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from farkv.bench import calibrate as module
from farkv.bench.calibrate import Times, calibrate, draw_calibration, find_crossover
from farkv.calibrate.crossover import RecordShape, load_crossover
from farkv.kernels.native import load_native
from tests.bench.plain import TINY, PlainNative


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "require_native", lambda what: PlainNative())
    return tmp_path


def test_selecting_must_win_at_every_longer_context_too() -> None:
    times = [Times(128, 1, 2), Times(256, 3, 2), Times(512, 3, 4), Times(1024, 9, 5), Times(2048, 20, 6)]
    assert find_crossover(times) == 1024
    assert find_crossover(times[:3]) is None
    assert find_crossover([Times(128, 2, 1)]) == 128


def test_what_is_found_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_times", lambda native, shape, dtype, n, rounds: Times(n, n / 100, 3.0))
    found = calibrate(contexts=(128, 256, 512))
    shape = RecordShape(8, 64, 4, "bfloat16")
    assert found.tokens == 512 == load_crossover("native-plain", shape)
    row = found.to_dict()
    assert (row["crossover_tokens"], row["shape"]) == (512, shape._asdict())
    assert len(row["rows"]) == 6
    with (console := Console(width=80)).capture() as out:
        console.print(draw_calibration(found))
    assert "selecting is faster from 512 tokens on" in out.get()


def test_each_shape_and_dtype_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "measure_times", lambda native, shape, dtype, n, rounds: Times(n, n / shape.head_dim, 3)
    )
    calibrate(contexts=(128, 256, 512))
    calibrate(contexts=(32, 64), shape=TINY, dtype=torch.float32)
    assert load_crossover("native-plain", RecordShape(8, 64, 4, "bfloat16")) == 256
    assert load_crossover("native-plain", RecordShape(2, 16, 2, "float32")) == 64
    assert load_crossover("native-plain", RecordShape(2, 16, 2, "bfloat16")) is None


def test_where_selecting_never_wins_all_is_read_as_far_as_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_times", lambda native, shape, dtype, n, rounds: Times(n, 1.0, 3.0))
    found = calibrate(contexts=(128, 256))
    assert found.tokens is None
    assert load_crossover("native-plain", found.shape) == 256
    with (console := Console(width=80)).capture() as out:
        console.print(draw_calibration(found))
    assert "never faster: up to 256 tokens" in out.get()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_run_over_the_same_records(dtype: torch.dtype) -> None:
    times = module.measure_times(PlainNative(), TINY, dtype, 128, rounds=1)
    assert times.context == 128
    assert min(times.dense_ms, times.select_ms) > 0


@pytest.mark.skipif(load_native() is None, reason="the native library was not built")
@pytest.mark.parametrize("context", [40, 800])
def test_the_real_kernels_take_what_is_timed(context: int) -> None:
    native = load_native()
    assert native is not None
    times = module.measure_times(native, TINY, torch.float32, context, rounds=1)
    assert min(times.dense_ms, times.select_ms) > 0
