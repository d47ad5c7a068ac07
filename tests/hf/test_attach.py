"""Attach and detach: nothing is left behind, ordinary caches are untouched, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import farkv
from farkv.calibrate.profile import Profile
from farkv.errors import (
    CacheStateError,
    ConfigError,
    ProfileError,
    UnsupportedModelError,
)
from farkv.methods import Full, InfiniGen, Window
from tests.models import VOCAB, assert_same, forward, generate, make_model, make_prompt, plain_cache

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def describe(model: PreTrainedModel) -> Any:
    """Return everything that attaching could leave behind."""
    hooks = [[len(getattr(m, name)) for name in HOOKS] for m in model.modules()]
    return hooks, model.config._attn_implementation, [sorted(vars(m)) for m in model.modules()]


def settle(model: PreTrainedModel) -> Any:
    """Let transformers make its own lazy attributes, then describe."""
    generate(model, make_prompt(1))
    return describe(model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "qwen3_next"])
def test_nothing_is_left_after_exit(family: str) -> None:
    model = make_model(family)
    before, plain = settle(model), generate(model, make_prompt(2, pad=5))
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        assert describe(model) != before
        generate(model, make_prompt(1), far.new_cache(verify=2))
    assert describe(model) == before
    assert not any(hasattr(m, "farkv_base") for m in model.modules())
    assert_same(generate(model, make_prompt(2, pad=5)), plain)


def test_eager_comes_back_as_eager() -> None:
    model = make_model("llama", implementation="eager")
    with farkv.attach(model):
        assert model.config._attn_implementation != "eager"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("source", ["attn", "residual", "post_attn"])
@pytest.mark.parametrize("place", ["mlp", "self_attn"])
def test_an_exception_in_the_middle(place: str, source: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(2, pad=4)
    before, plain = settle(model), generate(model, prompt)

    def fail(module: Any, args: Any, out: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop here")

    calls: list[int] = []
    with farkv.attach(model, InfiniGen(fraction=1.0, source=source)) as far:
        hook = getattr(model.model.layers[2], place).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            generate(model, prompt, cache := far.new_cache())
        hook.remove()
        assert not any(isinstance(held, torch.nn.Module) for held in vars(cache).values())
        assert_same(generate(model, prompt, far.new_cache()), plain)
        assert_same(generate(model, prompt, plain_cache(model)), plain)
    assert describe(model) == before
    assert_same(generate(model, prompt), plain)


def test_an_exception_leaves_the_with_block_clean() -> None:
    model = make_model("llama")
    before = settle(model)
    with pytest.raises(ZeroDivisionError), farkv.attach(model):
        raise ZeroDivisionError
    assert describe(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_oss"])
def test_an_ordinary_cache_stays_ordinary(family: str) -> None:
    model, prompt = make_model(family), make_prompt(3, pad=6)
    plain = generate(model, prompt)
    with farkv.attach(model, InfiniGen(fraction=0.1)):
        assert_same(generate(model, prompt, plain_cache(model)), plain)
    with farkv.attach(model, InfiniGen(fraction=0.1), every_generate=False):
        assert_same(generate(model, prompt), plain)


def test_a_pass_without_a_cache_is_plain() -> None:
    model, ids = make_model("llama"), make_prompt(2)["input_ids"]
    plain = model(ids, use_cache=False).logits
    with farkv.attach(model, InfiniGen(fraction=0.1)):
        assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_two_caches_at_once_do_not_meet() -> None:
    model = make_model("llama")
    one, two = make_prompt(1)["input_ids"], make_prompt(1, tokens=40, seed=4)["input_ids"]

    def alone(ids: torch.Tensor) -> list[torch.Tensor]:
        cache = far.new_cache()
        return [forward(model, piece, cache) for piece in (ids[:, :-3], *ids[:, -3:].split(1, 1))]

    with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB") as far:
        expected = [alone(one), alone(two)]
        caches = [far.new_cache(), far.new_cache()]
        got: list[list[torch.Tensor]] = [[], []]
        pieces = zip((one[:, :-3], *one[:, -3:].split(1, 1)), (two[:, :-3], *two[:, -3:].split(1, 1)), strict=True)
        for pair in pieces:
            for i in (0, 1):
                got[i].append(forward(model, pair[i], caches[i]))
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(got[i], expected[i], strict=True))


def test_output_attentions_still_come() -> None:
    model = make_model("llama", implementation="eager")
    prompt = make_prompt(2, pad=4)
    plain = generate(model, prompt, output_attentions=True)
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        ours = generate(model, prompt, far.new_cache(), output_attentions=True)
    assert_same(ours, plain)
    for step, expected in zip(ours.attentions, plain.attentions, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))


def test_attaching_twice_is_refused() -> None:
    model = make_model("llama")
    with farkv.attach(model), pytest.raises(CacheStateError, match="detach it first"):
        farkv.attach(model)
    farkv.attach(model).detach()


def test_a_detached_handle_makes_no_cache() -> None:
    far = farkv.attach(make_model("llama"))
    with pytest.raises(CacheStateError, match="no cache was made"):
        far.receipt()
    far.detach()
    far.detach()
    with pytest.raises(CacheStateError, match="attach again"):
        far.new_cache()


def test_models_that_cannot_be_managed_are_refused() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    for model in (bloom, t5):
        before = describe(model)
        with pytest.raises(UnsupportedModelError):
            farkv.attach(model)
        assert describe(model) == before


def test_bad_arguments_are_refused_and_nothing_is_attached() -> None:
    model = make_model("llama")
    before = settle(model)
    with pytest.raises(ConfigError, match="one method"):
        farkv.attach(model, Full(), Window())
    with pytest.raises(ConfigError, match="near"):
        farkv.attach(model, near="lots")
    with pytest.raises(ConfigError, match="host"):
        farkv.attach(model, host=-1)
    with pytest.raises(ProfileError, match="cannot be read"):
        farkv.attach(model, profile="/nowhere/profile.safetensors")
    with pytest.raises(ConfigError, match="fraction"):
        farkv.attach(model, InfiniGen(fraction=0.2, paper=True))  # the dense first of four layers is more than that
    assert describe(model) == before


@pytest.mark.parametrize("odd", [5, 0.5, b"x", ["x"], True])
@pytest.mark.parametrize("name", ["profile", "plan", "kernel", "evict", "quant", "disk"])
def test_arguments_of_another_type_are_refused(name: str, odd: Any) -> None:
    model = make_model("llama")
    before = settle(model)
    with pytest.raises((ConfigError, TypeCheckError)):
        farkv.attach(model, **{name: odd})
    assert describe(model) == before


def test_a_profile_must_fit_the_models_layers(tmp_path: Path) -> None:
    model = make_model("llama")
    before, measured = settle(model), farkv.profile(model, [make_prompt(1, tokens=40)["input_ids"][0]], curves=False)
    parts = ("query", "key", "mean", "svd")
    moved = {f"layer.9.{part}": measured.tensors[f"layer.3.{part}"] for part in parts}
    fewer = {name: tensor for name, tensor in measured.tensors.items() if not name.startswith("layer.3.")}
    one_head = {name: tensor[:, :1].contiguous() for name, tensor in measured.tensors.items()}
    for tensors, said in (
        (fewer, "is of layers"),
        ({**fewer, **moved}, "is of layers"),
        (one_head, "is of 1 KV heads"),
    ):
        wrong = Profile(measured.identity, tensors)
        wrong.save(tmp_path / "profile.safetensors")
        for given in (wrong, tmp_path / "profile.safetensors"):
            with pytest.raises(ProfileError, match=said + ".*farkv profile"):
                farkv.attach(model, profile=given)
        assert describe(model) == before


def test_a_model_from_no_folder_takes_no_profile_from_the_working_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profile.safetensors").write_bytes(b"of something else")
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    assert model.config._name_or_path == ""
    with farkv.attach(model) as far:
        assert far.setting.profile is None


@pytest.mark.parametrize(
    "options", [{"tokens": -1}, {"verify": -1}, {"tokens": 2**60}, {"batch": 0}, {"chunk_tokens": 0}, {"verify": True}]
)
def test_bad_cache_options_are_refused(options: dict[str, int]) -> None:
    with farkv.attach(make_model("llama")) as far, pytest.raises(ConfigError, match="expected an integer"):
        far.new_cache(**options)


def test_a_model_of_sliding_layers_alone_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("mistral_sliding")
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        generate(model, make_prompt(1), far.new_cache())
        rows = far.receipt().layers
    assert "nothing to manage" in caplog.text
    assert not any(row.managed for row in rows)
    assert all("sliding_attention" in (row.why or "") for row in rows)
