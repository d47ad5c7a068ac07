"""The crossover: from the times, and into the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from farkv.bench import calibrate as module
from farkv.bench.calibrate import Times, calibrate, draw_calibration, find_crossover
from farkv.calibrate.crossover import load_crossover
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
    monkeypatch.setattr(module, "measure_times", lambda native, shape, n, rounds: Times(n, n / 100, 3.0))
    found = calibrate(contexts=(128, 256, 512))
    assert found.tokens == 512 == load_crossover("native-plain")
    row = found.to_dict()
    assert row["crossover_tokens"] == 512
    assert len(row["rows"]) == 6
    with (console := Console(width=80)).capture() as out:
        console.print(draw_calibration(found))
    assert "selecting is faster from 512 tokens on" in out.get()


def test_nothing_is_written_where_selecting_never_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_times", lambda native, shape, n, rounds: Times(n, 1.0, 3.0))
    found = calibrate(contexts=(128, 256))
    assert found.tokens is None
    assert list(folder.iterdir()) == []
    with (console := Console(width=80)).capture() as out:
        console.print(draw_calibration(found))
    assert "never faster, up to 256 tokens" in out.get()


def test_both_ways_run_over_the_same_records() -> None:
    times = module.measure_times(PlainNative(), TINY, 128, rounds=1)
    assert times.context == 128
    assert min(times.dense_ms, times.select_ms) > 0
