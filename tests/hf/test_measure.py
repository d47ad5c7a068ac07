"""`farkv.profile` on tiny models: it measures what the model computes, and what it saves is found again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import farkv
from farkv.errors import InputError, ProfileError
from farkv.methods import InfiniGen
from tests.models import assert_same, generate, make_model, make_prompt

PROMPTS = [make_prompt(1, tokens=n, seed=n)["input_ids"][0] for n in (30, 50)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "qwen3_next"])
def test_every_managed_layer_is_measured(family: str) -> None:
    model = make_model(family)
    plain = generate(model, make_prompt(1))
    told: list[tuple[int, int]] = []
    profile = farkv.profile(model, PROMPTS, on_prompt=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    with farkv.attach(model, InfiniGen(fraction=0.3), profile=profile) as far:
        generate(model, make_prompt(2, tokens=40, pad=9), far.new_cache())
        managed = {row.layer for row in far.receipt().layers if row.managed}
    assert {int(name.split(".")[1]) for name in profile.tensors} == managed
    assert all(t.isfinite().all() for t in profile.tensors.values())
    assert_same(generate(model, make_prompt(1)), plain)


def test_the_moments_are_those_of_the_models_own_keys() -> None:
    model = make_model("llama")
    profile = farkv.profile(model, PROMPTS)
    sums, count = torch.zeros(2, 8, dtype=torch.float64), 0
    for ids in PROMPTS:
        cache = model(input_ids=ids[None]).past_key_values
        sums += cache.layers[2].keys[0].double().sum(1)
        count += len(ids)
    assert torch.allclose(profile.bilinear(2)[2][0, :, 0].double(), sums / count, atol=1e-5)


@pytest.mark.parametrize("paper", [False, True])
def test_a_profile_is_used(paper: bool) -> None:
    model = make_model("llama")
    method = InfiniGen(fraction=0.4, paper=paper)
    profile = farkv.profile(model, PROMPTS)
    with farkv.attach(model, method, profile=profile) as far:
        cache = far.new_cache()
        generate(model, make_prompt(2, tokens=40), cache)
        assert "skew_from_prompt" not in cache.account.fallbacks
    with farkv.attach(model, method, profile=False) as far:
        cache = far.new_cache()
        generate(model, make_prompt(2, tokens=40), cache)
        assert "skew_from_prompt" in cache.account.fallbacks


def test_a_profile_from_a_file_and_beside_the_weights(tmp_path: Path) -> None:
    model = copy.deepcopy(make_model("llama"))
    path = tmp_path / "profile.safetensors"
    farkv.profile(model, PROMPTS).save(path)
    with farkv.attach(model, profile=path) as far:
        assert far.profile is not None
    model.config._name_or_path = str(tmp_path)
    with farkv.attach(model) as far:
        assert far.profile is not None
    with farkv.attach(model, profile=False) as far:
        assert far.profile is None


def test_the_same_checkpoint_in_another_dtype_is_the_same_model() -> None:
    model = make_model("llama")
    profile = farkv.profile(model, PROMPTS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    farkv.attach(half, profile=profile).detach()


def test_a_profile_of_another_model_is_refused() -> None:
    profile = farkv.profile(make_model("llama"), PROMPTS)
    other = make_model("qwen2")
    with pytest.raises(ProfileError, match="make one for this model"):
        farkv.attach(other, profile=profile)
    assert other.config._attn_implementation == "sdpa"
    twin = copy.deepcopy(make_model("llama"))
    twin.get_input_embeddings().weight.data += 0.5
    with pytest.raises(ProfileError, match="weights"):
        farkv.attach(twin, profile=profile)


def test_no_prompt_is_an_input_error() -> None:
    for prompts in ([], [[5]]):
        with pytest.raises(InputError, match="at least one prompt"):
            farkv.profile(make_model("llama"), prompts)
