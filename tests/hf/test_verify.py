"""`verify`: what it reports is true, and it changes no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import farkv
from farkv.methods import InfiniGen, Method, Window
from tests.hf.tape import Replay, Tape, replay, replay_attention
from tests.models import assert_same, generate, make_model, make_prompt

PROMPT = make_prompt(2, tokens=40, pad=10)


def run(model: Any, method: Method, near: Any = None, n: int = 6, **options: Any) -> Any:
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache(**options)
        with Tape(model, cache) as tape:
            out = generate(model, PROMPT, cache, n=n)
        return out, far.receipt(), tape


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_reading_all_is_perfect(family: str, near: Any) -> None:
    _, receipt, _ = run(make_model(family), InfiniGen(fraction=1.0), near, verify=3)
    quality = receipt.quality
    assert quality.top1_agreement == 1.0
    # KL of equal distributions: what float32 leaves of a sum of 97 terms.
    assert quality.kl_mean < 1e-6
    assert quality.mass_mean == pytest.approx(1.0, abs=1e-5)
    assert quality.steps == 3 * 2


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "qwen3_next", "lfm2"])
def test_verifying_changes_no_answer(family: str, near: Any) -> None:
    model, method = make_model(family), InfiniGen(fraction=0.3)
    plain, plain_receipt, _ = run(model, method, near)
    verified, receipt, _ = run(model, method, near, verify=4)
    assert_same(verified, plain)
    assert receipt.read_fraction == plain_receipt.read_fraction
    assert receipt.context_tokens == plain_receipt.context_tokens
    assert receipt.generated_tokens == plain_receipt.generated_tokens


def sparse_passes(tape: Tape) -> list[Any]:
    """Leave out the dense passes that verification adds: they read nothing sparsely and are taken back."""
    return [p for p in tape.passes if p.reads or p.inputs["input_ids"].shape[1] > 1]


@pytest.mark.parametrize("method", [InfiniGen(fraction=0.3), InfiniGen(fraction=0.4, top_p=0.5), Window(fraction=0.3)])
def test_quality_is_that_of_an_independent_computation(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    _, receipt, tape = run(model, method, verify=5)
    passes = sparse_passes(tape)
    masses: list[torch.Tensor] = []

    def weigh(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, **kw: Any
    ):
        if module.layer_idx in Replay.reads:
            positions, valid = Replay.reads[module.layer_idx]
            logits = q.reshape(2, 2, 2, -1) @ k.mT * scaling
            if mask is not None:
                logits = logits.masked_fill(~mask, -math.inf)
            found = logits.softmax(-1).mean(2).gather(-1, positions)
            masses.append((found if valid is None else found * valid).sum(-1))
        return replay_attention(module, q, k, v, mask, scaling, **kw)

    monkeypatch.setattr("tests.hf.tape.replay_attention", weigh)
    from transformers import AttentionInterface

    AttentionInterface.register("replay_for_tests", weigh)
    try:
        sparse = replay(model, passes, torch.float64)
    finally:
        AttentionInterface.register("replay_for_tests", replay_attention)
    mass = torch.stack(masses)
    assert receipt.quality.mass_mean == pytest.approx(mass.mean().item(), abs=1e-5)
    assert receipt.quality.mass_min == pytest.approx(mass.min().item(), abs=1e-5)
    # The reference of each step is a dense step over the keys that the sparse steps before it have left.
    kl, agreements = [], []
    for i in range(1, len(passes)):
        dense = replay(model, [*passes[:i], without_reads(passes[i])], torch.float64)[-1].log_softmax(-1)
        ours = sparse[i].log_softmax(-1)
        kl += (dense.exp() * (dense - ours)).sum(-1).tolist()
        agreements += (dense.argmax(-1) == ours.argmax(-1)).tolist()
    assert receipt.quality.steps == len(kl)
    assert receipt.quality.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-6)
    assert receipt.quality.top1_agreement == sum(agreements) / len(agreements)


def without_reads(p: Any) -> Any:
    """Return the same pass, dense."""
    return type(p)(p.inputs, p.reorder)


def test_an_exception_while_verifying_leaves_a_usable_cache() -> None:
    model = make_model("llama")
    ids = make_prompt(1)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache(verify=5)
        model(input_ids=ids, past_key_values=cache)

        def fail(*_: object) -> None:
            raise RuntimeError("stop here")

        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        hook.remove()
        assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
        ours = model(input_ids=ids[:, :1], past_key_values=cache).logits
    plain = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("verify", [0, 3])
def test_a_limit_that_admits_holds_the_verifying_pass_too(verify: int) -> None:
    model = make_model("llama", num_hidden_layers=2)
    prompt = make_prompt(tokens=60)
    ran = 0
    for near in range(10_000, 60_000, 2_000):
        with farkv.attach(model, InfiniGen(fraction=0.3), near=near) as far:
            try:
                cache = far.new_cache(tokens=70, verify=verify)
            except farkv.FarKVError:
                continue
            generate(model, prompt, cache, n=8)
            receipt = far.receipt()
        assert receipt.kv_bytes.near_peak <= near
        assert (receipt.quality is not None) == (verify > 0)
        ran += 1
    assert 0 < ran < 25
