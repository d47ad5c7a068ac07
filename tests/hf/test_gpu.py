"""The same promises where near memory is a GPU's and records cross a real link."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.kernels.gpu import load_gpu
from farkv.methods import Full, InfiniGen, Method, Window
from tests.hf.tape import Tape, replay, worst
from tests.models import assert_same, generate, make_model, make_prompt
from tests.test_hygiene import NoSync

pytestmark = pytest.mark.gpu
PROMPT = make_prompt(3, tokens=40, pad=16)


def on_gpu(family: str) -> Any:
    return copy.deepcopy(make_model(family)).cuda()


def to_gpu(prompt: Any) -> Any:
    return {name: t.cuda() for name, t in prompt.items()}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0), InfiniGen(fraction=1.0, paper=True)], ids=repr)
@pytest.mark.parametrize("on_disk", [False, True])
def test_reading_all_is_exact(method: Method, options: Any, on_disk: bool, tmp_path: Path) -> None:
    model, prompt = on_gpu("llama"), to_gpu(PROMPT)
    plain = generate(model, prompt, **options)
    with farkv.attach(model, method, near="64MiB", disk=f"{tmp_path}:1GiB" if on_disk else None) as far:
        assert_same(generate(model, prompt, far.new_cache(), **options), plain)
        assert far.receipt().exact == "bit"


@pytest.mark.parametrize("method", [InfiniGen(fraction=0.3), InfiniGen(fraction=0.4, alpha=2.0)], ids=repr)
def test_the_choice_on_the_gpu_is_replayed_densely(method: Method) -> None:
    model, prompt = on_gpu("llama"), to_gpu(PROMPT)
    with farkv.attach(model, method, near="64MiB") as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=6)
        receipt = far.receipt()
    for p in tape.passes:
        p.inputs = {n: t.cpu() for n, t in p.inputs.items()}
        p.reads = {i: (a.cpu(), None if b is None else b.cpu()) for i, (a, b) in p.reads.items()}
        p.logits = p.logits.cpu()
    plain = make_model("llama")
    exact = replay(plain, tape.passes, torch.float64)
    noise = worst(replay(plain, tape.passes, torch.float32), exact)
    # Two machines round differently: several times the reference's own error.
    assert worst([p.logits for p in tape.passes], exact) <= 16 * noise
    assert receipt.fetched_bytes_per_token > 0
    assert receipt.kv_bytes.near_peak <= 64 * 2**20


def test_a_decode_step_reads_no_value_back() -> None:
    # The mode watches this thread alone: the link's worker has to know the positions that it gathers.
    model, prompt = on_gpu("llama"), to_gpu(make_prompt(2, tokens=70))
    with farkv.attach(model, InfiniGen(fraction=0.3), near="64MiB") as far:
        cache = far.new_cache(tokens=90, batch=2)
        model(input_ids=prompt["input_ids"], past_key_values=cache)
        # The first estimate of every layer is compared with the probe's.
        model(input_ids=prompt["input_ids"][:, :1], past_key_values=cache)
        with NoSync():
            model(input_ids=prompt["input_ids"][:, :1], past_key_values=cache)


# In even steps: tables that are learned from so few keys may differ by rounding.
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=0.3, index_bits=8)], ids=["full", "infinigen"])
def test_pages_and_coded_records_read_as_on_a_cpu(method: Method, tmp_path: Path) -> None:
    ids = make_prompt(1, tokens=300)["input_ids"]

    def run(model: Any, **storage: Any) -> list[torch.Tensor]:
        with farkv.attach(model, method, near="64MiB", **storage) as far, torch.no_grad():
            cache = far.new_cache(tokens=320)
            where = next(model.parameters()).device
            for start in range(0, 280, 140):
                model(input_ids=ids[:, start : start + 140].to(where), past_key_values=cache)
            steps = [model(input_ids=ids[:, t : t + 1].to(where), past_key_values=cache) for t in range(280, 290)]
        return [out.logits.cpu() for out in steps]

    for storage in ({"disk": f"{tmp_path}:64MiB"}, {"quant": "int8"}):
        here, there = run(make_model("llama"), **storage), run(on_gpu("llama"), **storage)
        # Two machines fit an index alike to rounding: a choice may differ at some steps. A row that is read wrong
        # differs at all of them.
        assert sum(torch.allclose(a, b, atol=1e-3) for a, b in zip(here, there, strict=True)) >= 5


def test_a_copied_cache_goes_on_as_the_first() -> None:
    """The copy's rows are where the GPU can read them, too."""
    model, prompt = on_gpu("llama"), to_gpu(make_prompt(1, tokens=70))
    for method in (Full(), InfiniGen(fraction=0.3), Window(fraction=0.3)):
        with farkv.attach(model, method, near="64MiB") as far, torch.no_grad():
            cache = far.new_cache(tokens=90)
            model(input_ids=prompt["input_ids"], past_key_values=cache)
            twin = copy.deepcopy(cache)
            first, second = (
                model(input_ids=prompt["input_ids"][:, :1], past_key_values=each).logits for each in (cache, twin)
            )
            assert torch.equal(first, second)


def test_a_gpu_has_its_kernels() -> None:
    kernels = load_gpu()
    assert kernels is not None and kernels is load_gpu()
    assert kernels.name == "triton" and not kernels.interpreted
