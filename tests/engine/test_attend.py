"""Kernels in the place of plain operations: where they run, where they must not, and that the numbers are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import farkv
from farkv.calibrate.crossover import Crossover, RecordShape
from farkv.errors import ConfigError
from farkv.hf import _compat
from farkv.hf import attach as attach_module
from farkv.kernels.native import load_native
from farkv.methods import Full, InfiniGen
from tests.models import generate, make_model, make_prompt

NATIVE = load_native()
PROMPT = make_prompt(1, tokens=90)
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native library was not built")


def run(method: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """Return the logits of a few decode steps, and the receipt."""
    with farkv.attach(make_model("llama"), method, profile=False, **options) as far:
        out = generate(far.model, PROMPT, far.new_cache(), n=5)
        return torch.cat(list(out.logits)), far.receipt()


def assert_close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert (ours - plain).abs().max() <= 2e-5 * plain.abs().max()


@needs_native
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0)])
def test_what_reads_all_is_native_only_where_that_was_asked_for(method: Any) -> None:
    assert NATIVE is not None
    plain, receipt = run(method, kernel="plain")
    assert receipt.kernel == "torch-sdpa"
    auto, _ = run(method)
    assert torch.equal(auto, plain)
    native, receipt = run(method, kernel="native")
    assert receipt.kernel == f"{NATIVE.name}+torch-sdpa"
    assert receipt.read_fraction == 1.0
    assert_close(native, plain)


@needs_native
def test_a_short_context_is_read_whole_without_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens, fraction in ((200, 1.0), (50, None)):
        monkeypatch.setattr(attach_module, "choose_crossover", lambda *_, n=tokens: Crossover(n, "measured"))
        logits, receipt = run(InfiniGen())
        (note,) = receipt.notes
        if fraction is not None:
            assert (receipt.read_fraction, receipt.index_fraction) == (1.0, 0.0)
            assert_close(logits, run(Full())[0])
            assert note.startswith("read everything: 94 tokens are not above the crossover of 200")
        else:
            assert receipt.read_fraction < 1.0
            assert receipt.index_fraction > 0.0
            assert note.startswith("chose what to read: 94 tokens are above the crossover of 50")
        assert note.endswith("(measured)")
        assert note in str(receipt)
        # A fraction that was given is a cap at any length, of which nothing is to be said.
        receipt = run(InfiniGen(fraction=0.3))[1]
        assert (receipt.read_fraction <= 0.3, receipt.notes) == (True, ())


@needs_native
def test_what_was_not_measured_is_assumed_and_said() -> None:
    _, receipt = run(InfiniGen())
    assert receipt.read_fraction == 1.0
    assert "(assumed; farkv bench --calibrate --model NAME measures it)" in receipt.notes[0]
    # Nothing is assumed without kernels, nor where records travel.
    assert run(InfiniGen(), kernel="plain")[1].notes == ()
    assert run(InfiniGen(), near="1MiB")[1].notes == ()


@needs_native
def test_the_shape_is_that_of_the_models_records(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RecordShape] = []
    monkeypatch.setattr(
        attach_module, "choose_crossover", lambda _, shape: seen.append(shape) or Crossover(0, "measured")
    )
    run(InfiniGen())
    config = make_model("llama").config
    groups = config.num_attention_heads // config.num_key_value_heads
    assert seen == [RecordShape(config.num_key_value_heads, config.head_dim, groups, "float32")]


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 9}, (2, 64, 7)),
        ({"num_attention_heads": 12, "hidden_size": 768}, (12, 64, 1)),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": None, "hidden_size": 256}, (8, 32, 1)),
        ({"num_attention_heads": "many"}, (1, 64, 1)),
        ({}, (1, 64, 1)),
    ],
)
def test_heads_are_what_a_configuration_says_of_them(config: dict[str, Any], heads: tuple[int, int, int]) -> None:
    assert _compat.describe_heads(SimpleNamespace(**config)) == heads


@needs_native
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_coded_records_are_read_where_they_lie(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_module, "choose_crossover", lambda *_: Crossover(200, "measured"))
    ours, receipt = run(InfiniGen(), quant=quant)
    assert receipt.fetched_bytes_per_token == 0
    assert receipt.kernel.startswith("native")
    plain, _ = run(InfiniGen(fraction=1.0), quant=quant, kernel="plain")
    assert_close(ours, plain)
    chosen, receipt = run(InfiniGen(fraction=0.3), quant=quant)
    assert receipt.fetched_bytes_per_token == 0
    assert receipt.read_fraction <= 0.3
    assert chosen.isfinite().all()


def test_a_wrong_kernel_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    with pytest.raises(ConfigError, match="kernel: expected auto, native or plain, got 'fast'"):
        farkv.attach(model, kernel="fast")
    monkeypatch.setattr(attach_module, "load_native", lambda: None)
    with pytest.raises(ConfigError, match="no fast kernels for cpu"):
        farkv.attach(model, kernel="native")
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        generate(model, PROMPT, far.new_cache(), n=3)
        assert far.receipt().kernel == "torch-sdpa"
