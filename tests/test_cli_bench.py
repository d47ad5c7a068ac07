"""`farkv bench` from the command line: a table, one object on stdout, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farkv.bench import calibrate, decode, fill, gather, machine
from farkv.bench.shapes import SHAPES
from farkv.hf.load import find_dtype, load_model
from tests.bench.plain import TINY, PlainNative
from tests.command import Done, farkv, run_process


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setenv("FARKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(decode, "load_native", PlainNative)
    for module in (calibrate, gather):
        monkeypatch.setattr(module, "require_native", lambda what: PlainNative())
    make = machine.make_buffer
    monkeypatch.setattr(machine, "make_buffer", lambda n: make(1 << 18))
    times = lambda native, shape, dtype, context, rounds: calibrate.Times(context, 1.0, 2.0)  # noqa: E731
    monkeypatch.setattr(calibrate, "measure_times", times)


def run(*arguments: str) -> Done:
    """Run a benchmark in this process."""
    return farkv("bench", *arguments)


def last_line(out: str) -> dict[str, Any]:
    """Return the object that is all of stdout."""
    assert out.count("\n") == 1
    return json.loads(out)


def test_decode_prints_a_table_a_picture_and_one_object(tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    code, out, err = run(
        "decode", "--shape", "tiny", "--contexts", "128,256", "--rounds", "1", "--threads", "1", "--json", "--plot",
        str(picture),
    )  # fmt: skip
    assert code == 0, err
    found = last_line(out)
    assert {row["method"] for row in found["rows"]} >= {"infinigen", "dense-native", "matmul-bf16", "hf-sdpa-fp32"}
    wanted = {
        "method",
        "context",
        "batch",
        "ms_per_layer",
        "read_fraction",
        "floor_percent",
        "ms_low",
        "ms_high",
        "rounds",
    }
    assert all(wanted <= set(row) for row in found["rows"])
    assert found["machine"]["threads"] == 1
    assert "dense-native" in err
    assert picture.is_file()


def test_quant_adds_coded_records_and_methods_are_a_choice() -> None:
    code, out, err = run(
        "decode", "--shape", "tiny", "--contexts", "128", "--rounds", "1", "--quant", "--methods", "infinigen", "--json"
    )
    assert code == 0, err
    assert [row["method"] for row in last_line(out)["rows"]] == ["infinigen", "infinigen-int8", "infinigen-int4"]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["gather"], 13),
        (["prefill", "--shape", "tiny", "--contexts", "64", "--rounds", "1", "--layers", "1"], 2),
        (["e2e", "--shape", "tiny", "--contexts", "64,128", "--rounds", "1"], 4),
        (["decode", "--calibrate"], 18),
    ],
)
def test_every_command_prints_one_object(arguments: list[str], rows: int) -> None:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    assert len(last_line(out)["rows"]) == rows
    assert "PlainNative" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["decode", "--shape", "gpt"], "--shape: expected one of"),
        (["decode", "--contexts", "much"], "--contexts: expected numbers"),
        (["decode", "--methods", "fast"], "--methods: expected some of"),
        (["decode", "--peer", "other"], "--peer: expected llama.cpp"),
        (["prefill", "--dtype", "int3"], "--dtype: expected"),
        (["e2e", "--methods", "dense-native"], "--methods: e2e supports"),
        (["e2e", "--peer", "other"], "--peer: expected llama.cpp"),
        (["e2e", "--peer", "llama.cpp"], "expected --model FILE.gguf"),
        (["e2e", "--peer", "llama.cpp", "-m", "x.gguf", "--batch", "2"], "--batch 1 only"),
        (["decode", "--shape", "tiny", "--contexts", "100000K"], "are available"),
        (["e2e", "--shape", "opt-6.7b"], "are available"),
        (["--calibrate", "--dtype", "int3"], "--dtype: expected auto"),
        (["--model", "demo", "gather"], "stand behind gather"),
        (["prefill", "--shape", "opt-6.7b"], "are available"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    monkeypatch.setattr(fill, "find_available_bytes", lambda: 1 << 30)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_calibrate_needs_no_command() -> None:
    code, out, err = run("--calibrate")
    assert (code, out) == (0, "")
    assert "up to 32 K tokens, the longest measured, everything is read" in " ".join(err.split())
    assert "8 x 64, groups of 4, bfloat16" in " ".join(err.split())


def test_calibrate_measures_the_shape_of_a_model_in_the_dtype_it_runs_in() -> None:
    for options, dtype in (([], str(find_dtype("demo")).removeprefix("torch.")), (["--dtype", "float32"], "float32")):
        code, _, err = run("--calibrate", "--model", "demo", *options)
        assert code == 0, err
        assert f"groups of 2, {dtype}" in " ".join(err.split())
    assert find_dtype("demo") == load_model("demo")[0].dtype


def test_help_shows_examples_in_eighty_columns() -> None:
    shown = run_process("bench", "decode", "--help").stdout
    assert "Examples" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "calibrate" in run()[1]
