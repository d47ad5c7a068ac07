"""Models with random weights: finite, and two of them over the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from farkv.bench.models import count_weight_bytes, make_model, share_weights
from farkv.bench.prefill import PrefillSettings, measure_prefill
from tests.bench.plain import TINY

OPT = replace(TINY, family="opt", kv_heads=4)
QWEN = replace(TINY, family="qwen3")
IDS = torch.arange(24)[None]


@pytest.mark.parametrize("shape", [TINY, OPT, QWEN], ids=lambda s: s.family)
def test_a_model_computes_what_a_usual_one_of_its_weights_does(shape) -> None:
    model = make_model(shape, 2, 64, torch.float32)
    usual = type(model)(model.config)
    usual.load_state_dict(model.state_dict())
    out = model(IDS).logits
    assert torch.isfinite(out).all()
    assert out.std() > 0
    torch.testing.assert_close(out, usual.eval()(IDS).logits)


def test_two_models_share_weights_but_no_hooks() -> None:
    model = make_model(TINY, 2, 64, torch.float32)
    twin = share_weights(model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    model.register_forward_hook(lambda *args: pytest.fail("the other's hook"))
    assert torch.isfinite(twin(IDS).logits).all()


@pytest.mark.parametrize("shape", [TINY, OPT], ids=lambda s: s.family)
def test_weight_bytes_are_those_of_the_matrices(shape) -> None:
    model = make_model(shape, 2, 64, torch.float32)
    layers = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    assert count_weight_bytes(shape, 2, 4) == sum(p.nbytes for p in layers)


def test_prefill_reads_the_same_prompt_with_and_without_farkv() -> None:
    told: list[tuple[int, int]] = []
    asked = PrefillSettings(TINY, (96,), rounds=2, chunk_tokens=64)
    report = measure_prefill(asked, lambda *done: told.append(done)).to_dict()
    assert [row["method"] for row in report["rows"]] == ["infinigen", "hf-sdpa-fp32"]
    ours, theirs = report["rows"]
    assert ours["ratio"] > 0
    assert theirs["ratio"] == 1.0
    assert ours["ms_per_layer"] == pytest.approx(1e3 * ours["s_per_1k_tokens"] * 96 / 1024 / 2, rel=0.05)
    assert told[-1] == (4, 4)
