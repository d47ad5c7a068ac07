"""In which dtype a model is loaded: the checkpoint's, or float32 where a CPU is no faster in half."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import farkv
from farkv.calibrate import processor
from farkv.hf.load import load_model
from farkv.methods import Full

FLAGS = {"slow": "fpu avx2 avx512f", "fast": "avx512_bf16 amx_bf16 amx_fp16"}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a folder with the demo model in half precision, and the dtype."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = load_model("demo", dtype=request.param, device="cpu")
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder), request.param


@pytest.mark.parametrize("cpu", FLAGS)
def test_half_precision_becomes_float32_on_a_cpu_that_is_slow_in_half(
    half: tuple[str, str], cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, name = half
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t: {FLAGS[cpu]}\n")
    monkeypatch.setattr(processor, "CPU_INFO", info)
    with caplog.at_level(logging.WARNING, "farkv"):
        model, _ = load_model(folder, device="cpu")
        asked, _ = load_model(folder, dtype=name, device="cpu")
    assert asked.dtype == getattr(torch, name)
    assert asked.lm_head.weight.dtype == asked.dtype
    if cpu == "fast":
        assert (model.dtype, caplog.messages) == (asked.dtype, [])
        return
    assert model.dtype == torch.float32
    (said,) = caplog.messages
    assert f"no fast products of {name}: run in float32, whose weights take " in said
    assert f"(--dtype {name} keeps them)" in said
    with farkv.attach(model, Full()) as far:
        far.new_cache()
        assert (far.receipt().weights.dtype, far.receipt().weights.source) == ("float32", f"{name} of the checkpoint")


def test_what_is_float32_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "farkv"):
        loaded = [load_model(name, device="cpu")[0] for name in (str(tmp_path), "demo")]
    assert caplog.messages == []
    for model in loaded:
        assert model.dtype == torch.float32
        with farkv.attach(model, Full()) as far:
            far.new_cache()
            assert far.receipt().weights.source is None
