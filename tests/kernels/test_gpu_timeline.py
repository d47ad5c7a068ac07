"""The picture of a trace counts what copied, what computed, and how much of the one the other hid."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent.parent.parent / "benchmarks" / "gpu_timeline.py"
if not FILE.is_file():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_timeline", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def event(category: str, name: str, ts: float, dur: float, stream: int) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1.0, "dur": 900.0},
        event("kernel", "gemm", 1000.0, 40.0, 7),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1020.0, 30.0, 13),
        event("kernel", "_fetch", 1045.0, 15.0, 13),
        event("kernel", "softmax", 1055.0, 5.0, 7),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1070.0, 10.0, 7),
    ]
}


def test_overlap_is_the_time_in_which_both_ran() -> None:
    timeline = load()
    intervals = timeline.read_intervals(TRACE)
    assert [(i.kind, i.start_us, i.stop_us) for i in intervals] == [
        ("compute", 0, 40), ("copy", 20, 50), ("copy", 45, 60), ("compute", 55, 60), ("compute", 70, 80),
    ]  # fmt: skip
    assert timeline.measure_overlap(intervals) == {
        "copy_us": 40.0, "compute_us": 55.0, "both_us": 25.0, "hidden_share": 0.625,
    }  # fmt: skip


def test_a_trace_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "trace.json").write_text(json.dumps(TRACE))
    overlap = load().draw_timeline(tmp_path / "trace.json", tmp_path / "timeline.png")
    assert overlap["hidden_share"] == 0.625
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_trace_without_device_work_hides_nothing() -> None:
    timeline = load()
    assert timeline.measure_overlap(timeline.read_intervals({})) == {
        "copy_us": 0, "compute_us": 0, "both_us": 0, "hidden_share": 0.0,
    }  # fmt: skip
