"""The calibration file: by processor and kernel, whole or not at all, and never trusted when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farkv.calibrate import crossover
from farkv.calibrate.crossover import (
    LEAST_TOKENS,
    MOST_TOKENS,
    RecordShape,
    choose_crossover,
    estimate_crossover,
    find_calibration_path,
    load_crossover,
    save_crossover,
)
from farkv.errors import ConfigError

SHAPE = RecordShape(8, 64, 4, "bfloat16")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARKV_CACHE_DIR", str(tmp_path / "new"))
    return tmp_path / "new"


def test_what_is_saved_is_loaded_by_kernel(folder: Path) -> None:
    assert load_crossover("native-avx2", SHAPE) is None
    path = save_crossover("native-avx2", SHAPE, 2048, {"threads": 1})
    save_crossover("native-generic", SHAPE, 8192, {})
    assert path == folder / "calibration.json"
    assert (load_crossover("native-avx2", SHAPE), load_crossover("native-generic", SHAPE)) == (2048, 8192)
    save_crossover("native-avx2", SHAPE, 1024, {})
    assert (load_crossover("native-avx2", SHAPE), load_crossover("native-generic", SHAPE)) == (1024, 8192)
    assert [p.name for p in folder.iterdir()] == ["calibration.json"]


def test_another_processor_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    save_crossover("native-avx2", SHAPE, 2048, {})
    monkeypatch.setattr(crossover, "read_cpu_model", lambda: "another")
    assert load_crossover("native-avx2", SHAPE) is None


def test_another_shape_has_its_own() -> None:
    save_crossover("native-avx2", SHAPE, 2048, {})
    for other in ({"kv_heads": 2}, {"head_dim": 128}, {"groups": 7}, {"dtype": "float32"}):
        assert load_crossover("native-avx2", SHAPE._replace(**other)) is None
    assert choose_crossover("native-avx2", SHAPE) == (2048, "measured")


def test_what_was_not_measured_is_assumed_from_the_shape() -> None:
    assert choose_crossover("native-avx2", SHAPE) == (estimate_crossover(SHAPE), "assumed")
    # What was measured (docs/speed.md, docs/decisions/0025): between 4 and 8 K; on Qwen 0.5B as fast at about 8 K.
    assert 4096 < estimate_crossover(SHAPE) <= 8192
    assert 8192 <= estimate_crossover(RecordShape(2, 64, 7, "bfloat16")) <= 12288
    assert estimate_crossover(SHAPE._replace(head_dim=128)) <= 4096


def test_the_estimate_falls_with_the_bytes_of_a_record_and_has_bounds() -> None:
    dims = [estimate_crossover(SHAPE._replace(head_dim=dim)) for dim in (8, 16, 32, 64, 96, 128, 256, 1024)]
    assert dims == sorted(dims, reverse=True)
    assert (dims[0], dims[-1]) == (MOST_TOKENS, LEAST_TOKENS)
    assert estimate_crossover(SHAPE._replace(dtype="float32")) < estimate_crossover(SHAPE)
    # All heads take longer alike.
    assert estimate_crossover(SHAPE._replace(kv_heads=1)) == estimate_crossover(SHAPE)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"format": "other", "entries": {}}',
        '{"format": "farkv-calibration-1", "entries": {"x": {"tokens": "many"}}}',
        '{"format": "farkv-calibration-1", "entries": {"x": {}}}', "\0",
        *(
            f'{{"format": "farkv-calibration-1", "entries": {{"x": {{"tokens": {odd}}}}}}}'
            for odd in ("NaN", "1e400", "9" * 5000, "1" + "0" * 18, "-1", "true", "2.0", "[" * 9999, '1, "tokens": 2')
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_left_alone(folder: Path, text: str) -> None:
    folder.mkdir()
    path = folder / "calibration.json"
    path.write_text(text)
    for call in (lambda: load_crossover("k", SHAPE), lambda: save_crossover("k", SHAPE, 1, {})):
        with pytest.raises(ConfigError, match=r"calibration\.json: cannot be read.*farkv bench --calibrate"):
            call()
    assert path.read_text() == text


def test_what_is_not_finite_is_never_written(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_crossover("k", SHAPE, 1, {"seconds": float("nan")})
    assert not (folder / "calibration.json").exists()


def test_a_file_that_cannot_be_written_is_named(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="calibration file"):
        save_crossover("k", SHAPE, 1, {})


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_crossover("k", SHAPE, 1, {})
    before = (folder / "calibration.json").read_text()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"cannot be written.*No space"):
        save_crossover("k", SHAPE, 2, {})
    assert [p.name for p in folder.iterdir()] == ["calibration.json"]
    assert (folder / "calibration.json").read_text() == before


def test_without_a_folder_of_ones_own_it_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARKV_CACHE_DIR")
    assert find_calibration_path().parent.name == "farkv"
