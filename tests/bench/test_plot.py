"""Table and picture: they fit, and lines have their names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from farkv.bench.plot import plot_rows, spread_out, thin_out
from farkv.bench.report import Report, Row, draw_rows, format_ms
from farkv.errors import ConfigError

MACHINE = {
    "cpu": "a processor", "threads": 2, "kernel": "native-avx512vbmi", "read_gb_per_s": 12.3,
    "gather_gb_per_s": 4.5, "gather_row_bytes": 512,
}  # fmt: skip


MS = {"infinigen": 1e-4, "infinigen-int8": 0.9e-4, "dense-native": 1e-3, "hf-eager-bf16": 1e-2}


def make_report(*, floor: bool = True) -> Report:
    rows = [
        Row(name, n, 16, ms * n, 0.9 * ms * n, 1.1 * ms * n, ms * n, 9, 0.0456 if name == "infinigen" else 1.0,
            12.3 if floor else None, ms * n / 9 if floor else None)
        for n in (1024, 131072, 262144)
        for name, ms in MS.items()
    ]  # fmt: skip
    return Report("decode", rows, MACHINE, {}, ["a note"])


@pytest.mark.parametrize("floor", [True, False])
def test_the_table_fits_into_eighty_columns(floor: bool) -> None:
    with (console := Console(width=80)).capture() as out:
        console.print(draw_rows(make_report(floor=floor)))
    lines = [line.rstrip() for line in out.get().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in out.get()
    assert ("of floor" in out.get()) == floor
    # Ten times as long as farkv's method at the same context.
    assert sum("10.0×" in line for line in lines) == 3


@pytest.mark.parametrize("floor", [True, False])
def test_a_picture_is_written(tmp_path: Path, floor: bool) -> None:
    pytest.importorskip("matplotlib")
    plot_rows(make_report(floor=floor), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_unknown_form_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"--plot: cannot draw .*bench\.nothing"):
        plot_rows(make_report(), tmp_path / "bench.nothing")


def test_labels_stay_apart_and_near_their_lines() -> None:
    assert spread_out([0.0, 50.0, 100.0], 11) == [0.0, 50.0, 100.0]
    assert spread_out([50.0, 50.0], 10) == [45.0, 55.0]
    places = spread_out([0.0, 1.0, 2.0, 60.0, 61.0], 11)
    assert all(b - a >= 11 - 1e-9 for a, b in pairwise(places))
    assert places[1] == pytest.approx(1.0)


def test_milliseconds_have_three_digits() -> None:
    assert [format_ms(ms) for ms in (1234.5, 12.345, 1.2345, 0.12345)] == ["1234", "12.3", "1.23", "0.123"]


def test_contexts_are_labelled_apart() -> None:
    many = [2**i for i in range(7, 24)]
    shown = thin_out(many, 8)
    assert len(shown) <= 9
    assert shown[-1] == many[-1]
    assert min(b / a for a, b in pairwise(shown)) >= (many[-1] / many[0]) ** (1 / 8) * 0.999
    assert thin_out([1000, 1024, 32768], 8) == [1024, 32768]
    assert thin_out([4096], 8) == [4096]
