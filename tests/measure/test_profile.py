"""`farkv.profile` on tiny models: it measures what the model computes, and what it saves is found again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import ConfigError, InputError, ProfileError, UnsupportedModelError
from farkv.measure.mini import Light
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
        # Ours is always the prompt's.
        assert ("skew_from_prompt" in cache.account.fallbacks) is paper


def test_a_profile_from_a_file_and_beside_the_weights(tmp_path: Path) -> None:
    model = copy.deepcopy(make_model("llama"))
    path = tmp_path / "profile.safetensors"
    farkv.profile(model, PROMPTS).save(path)
    with farkv.attach(model, profile=path) as far:
        assert far.setting.profile is not None
    model.config._name_or_path = str(tmp_path)
    with farkv.attach(model) as far:
        assert far.setting.profile is not None
    with farkv.attach(model, profile=False) as far:
        assert far.setting.profile is None


def test_the_same_checkpoint_in_another_dtype_is_the_same_model() -> None:
    model = make_model("llama")
    profile = farkv.profile(model, PROMPTS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    farkv.attach(half, profile=profile).detach()


def test_a_profile_of_another_model_is_refused() -> None:
    profile = farkv.profile(make_model("llama"), PROMPTS)
    other = make_model("qwen2")
    with pytest.raises(ProfileError, match="create one for this model"):
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


def test_a_profile_has_curves_unless_told_otherwise(tmp_path: Path) -> None:
    model = make_model("gemma3")
    farkv.profile(model, PROMPTS, window=4, pool=3, scorer="value").save(tmp_path / "p")
    curves = farkv.Profile.load(tmp_path / "p").curves()
    assert curves.keep.shape == curves.spread.shape == (2, 2, 1000)
    assert (curves.layers, curves.tokens.tolist()) == ((1, 3), [30, 50])
    assert curves.settings == {"scorer": "value", "window": 4, "pool": 3, "token_bytes": [128, 128]}
    with pytest.raises(ProfileError, match="gain curves"):
        farkv.profile(model, PROMPTS, curves=False).curves()


def test_short_prompts_count_for_the_skew_alone() -> None:
    model = make_model("llama")
    short = make_prompt(1, tokens=8, seed=5)["input_ids"][0]
    both = farkv.profile(model, [short, *PROMPTS])
    assert both.curves().tokens.tolist() == [30, 50]
    assert not torch.equal(both.svd(0), farkv.profile(model, PROMPTS).svd(0))
    with pytest.raises(ProfileError, match="longer than the observation window"):
        farkv.profile(model, [short]).curves()
    with pytest.raises(InputError, match="more than 8 tokens"):
        farkv.profile(model, [short], light=Light(0.25, 2))


def test_one_token_more_than_the_window_is_a_curve() -> None:
    curves = farkv.profile(make_model("llama"), [PROMPTS[0][:9]]).curves()
    assert torch.allclose(curves.keep, torch.full_like(curves.keep, 1e-3))


@pytest.mark.parametrize("paper", [False, True])
def test_infinigen_runs_with_a_profile_that_has_no_skew(paper: bool) -> None:
    model, method = make_model("llama"), InfiniGen(fraction=0.4, paper=paper)
    profile = farkv.profile(model, PROMPTS, light=Light(0.25, 2))
    assert not profile.has_skew
    prompt = make_prompt(2, tokens=40)
    with farkv.attach(model, method, profile=profile) as far:
        cache = far.new_cache()
        ours = generate(model, prompt, cache)
        assert ("skew_from_prompt" in cache.account.fallbacks) is paper
    with farkv.attach(model, method, profile=False) as far:
        assert_same(ours, generate(model, prompt, far.new_cache()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window: expected an integer from 1"),
        ({"pool": 4}, "pool odd"),
        ({"light": Light(0.0, 1)}, "light: tokens"),
        ({"light": Light(0.5, 0)}, "light: layers"),
        ({"light": Light(0.25, 2), "curves": False}, "drop one of them"),
    ],
)
def test_settings_that_cannot_be_used(settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        farkv.profile(make_model("llama"), PROMPTS, **settings)


def test_a_model_without_full_attention_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="a full-attention layer to measure"):
        farkv.profile(make_model("mistral_sliding"), PROMPTS)
