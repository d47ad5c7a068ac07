"""Bandwidths: rows by size and density, never the same rows twice in a cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console

from farkv.bench import gather, machine
from farkv.bench.gather import draw_gather, measure_rows
from farkv.bench.machine import DENSITIES, ROW_BYTES, draw_positions
from farkv.errors import ConfigError
from farkv.kernels.native import load_native
from tests.bench.plain import PlainNative


def test_every_pass_reads_other_rows_in_ascending_order() -> None:
    passes = draw_positions(1000, 0.2)
    assert len({int(p) for rows in passes for p in rows}) == 1000
    assert all((rows[1:] > rows[:-1]).all() for rows in passes)
    assert all(len(rows) == 200 for rows in passes)


def test_a_report_of_every_row_size_and_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "require_native", lambda what: PlainNative())
    told: list[tuple[int, int]] = []
    report = measure_rows(lambda *done: told.append(done), buffer_bytes=1 << 18)
    rows = report.to_dict()["rows"]
    assert rows[0]["method"] == "read"
    assert rows[0]["gb_per_s"] == 2.0
    assert {(r["row_bytes"], r["read_fraction"]) for r in rows[1:]} == {(b, d) for b in ROW_BYTES for d in DENSITIES}
    assert all(a[0] < b[0] for a, b in pairwise(told))
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as out:
        console.print(draw_gather(report))
    assert "512 bytes" in out.get()


def test_without_a_native_kernel_there_is_nothing_to_measure_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_native", lambda: None)
    with pytest.raises(ConfigError, match="gather: needs the native kernel"):
        measure_rows()


def test_the_native_kernel_measures_something() -> None:
    native = load_native()
    if native is None:
        pytest.skip("no native kernel was built here")
    found = machine.Machine(native, 0.05, buffer_bytes=1 << 20)
    before = found.read, found.gather(512)
    found.measure_again()
    assert found.read >= before[0] > 0
    assert found.gather(512) >= before[1] > 0
