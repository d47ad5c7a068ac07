"""What the system says of a processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from farkv.calibrate import processor
from farkv.calibrate.processor import multiplies_fast, read_cpu_model


def test_a_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_cpu_model()
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPU_INFO", info)
    info.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n")
    assert read_cpu_model() == "AMD EPYC 25/1"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert read_cpu_model() == f"{platform.machine()} 0x41 0xd40"
    info.unlink()
    assert read_cpu_model() == platform.processor() or platform.machine()


@pytest.mark.parametrize(
    ("says", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_fp16", False, False),
        ("flags\t\t: avx512_bf16", True, False),
        ("flags\t\t: amx_bf16 amx_fp16", True, True),
        ("Features\t: fp asimd asimdhp asimdfhm", False, True),
        ("Features\t: bf16", True, False),
        ("", False, False),
    ],
)
def test_what_is_fast_is_read_from_the_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, bfloat16: bool, float16: bool
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{says}\n" if says else "")
    monkeypatch.setattr(processor, "CPU_INFO", info)
    assert (multiplies_fast(torch.bfloat16), multiplies_fast(torch.float16)) == (bfloat16, float16)
