"""The fuzz of the native kernels: some of its calls, and that it sees what it looks for."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from farkv.kernels.native import list_native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import fuzz_kernels  # noqa: E402
from kernel_calls import Call, draw_call  # noqa: E402

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")


def draw_calls(entry: str, count: int) -> list[Call]:
    """Return usual calls of one entry point."""
    calls = (draw_call(random.Random(seed), wild=False) for seed in range(1000))
    return [call for call in calls if call.entry == entry][:count]


def test_random_calls_equal_their_twins() -> None:
    found = fuzz_kernels.run_batch(7, 0, 150)
    assert found == ["right"] * 150


@pytest.mark.parametrize(("at_end", "reach"), [(True, 1), (False, -1)])
def test_a_fence_ends_who_reads_one_byte_too_far(at_end: bool, reach: int) -> None:
    script = f"""
import ctypes, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
from fences import Fences
with Fences() as fences:
    x = fences.enclose(torch.arange(5, dtype=torch.uint8), {at_end})
    assert x.tolist() == [0, 1, 2, 3, 4]
    first = 4 if {at_end} else 0
    ctypes.string_at(x.data_ptr() + first, 1)
    print("within", flush=True)
    ctypes.string_at(x.data_ptr() + first + {reach}, 1)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=600)
    assert done.stdout == "within\n"
    assert done.returncode == -signal.SIGSEGV


def test_a_call_that_ends_the_process_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(seed: int, number: int) -> str:
        if number == 12:
            fuzz_kernels.os._exit(3)
        return "right"

    monkeypatch.setattr(fuzz_kernels, "try_call", end)
    assert fuzz_kernels.run_batch(0, 10, 4) == ["right", "right", "ended the process", "not made"]


def test_attention_that_is_slightly_off_is_wrong() -> None:
    calls = [call for call in draw_calls("attend", 60) if call.arguments["q"].dtype == torch.float32]
    answers = [(call, call.make()) for call in calls]
    answers = [(call, answer) for call, answer in answers if answer.any()]
    assert len(answers) > 20
    for call, answer in answers:
        assert call.check(answer) is None
        assert call.check(answer * 1.01) is not None
        assert call.check(torch.zeros_like(answer)) is not None
        assert call.check(torch.full_like(answer, torch.nan)) is not None


def test_a_choice_that_is_slightly_off_is_wrong() -> None:
    calls = [call for call in draw_calls("select", 60) if call.arguments["cap"] > 1]
    assert len(calls) > 10
    for call in calls:
        answer = call.make()
        assert call.check(answer) is None
        assert call.check(answer.flip(-1)) is not None
        assert call.check(answer + call.arguments["n"]) is not None


def test_rows_that_are_slightly_off_are_wrong() -> None:
    for call in draw_calls("gather", 20):
        answer = call.make()
        if answer.numel():
            answer[-1].view(torch.uint8).view(-1)[-1:] ^= 1
            assert call.check(answer) is not None
