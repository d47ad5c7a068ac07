"""A pass is committed or undone; whatever was stopped, the next call finds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.methods import Full, InfiniGen
from tests.models import FAMILIES, assert_same, forward, generate, make_model, make_prompt, plain_cache


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def stop_at(module: Any, call: int = 1) -> Any:
    """Stop the given call of a module; return the hook."""
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise Stop

    return module.register_forward_hook(fail)


@pytest.mark.parametrize("call", [1, 3])
def test_generate_goes_on_after_ctrl_c(call: int) -> None:
    """It slices its ids by the cache's length before the first pass, which is what undoes the stopped one."""
    model, prompt = make_model("llama"), make_prompt(1)
    plain = generate(model, prompt, plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache()
        hook = stop_at(model.model.layers[2], call)
        with pytest.raises(Stop):
            generate(model, prompt, cache)
        hook.remove()
        assert cache.get_seq_length() == (0 if call == 1 else prompt["input_ids"].shape[1] + call - 2)
        cache.crop(-cache.get_seq_length())
        assert_same(generate(model, prompt, cache), plain)


@pytest.mark.parametrize("part", ["layer", "head"])
def test_a_step_that_was_stopped_anywhere_is_there_once(part: str) -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB") as far:
        calm, cache = far.new_cache(), far.new_cache()
        for each in (calm, cache):
            forward(model, prompt, each)
        hook = stop_at(model.lm_head if part == "head" else model.model.layers[3])
        with pytest.raises(Stop):
            forward(model, prompt[:, :1], cache)
        hook.remove()
        for ids in (prompt[:, :1], prompt[:, 1:4], prompt[:, :1]):
            assert torch.equal(forward(model, ids, cache), forward(model, ids, calm))
        assert torch.equal(cache.token_ids, calm.token_ids)


def test_a_verifying_pass_that_is_stopped_leaves_no_mode_behind() -> None:
    model, prompt = make_model("gemma3"), make_prompt(1)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        calm, cache = far.new_cache(verify=9), far.new_cache(verify=9)
        for each in (calm, cache):
            forward(model, prompt, each)
        hook = stop_at(model.model.layers[2])
        with pytest.raises(Stop):
            forward(model, prompt[:, :1], cache)
        hook.remove()
        assert torch.equal(forward(model, prompt[:, :1], cache), forward(model, prompt[:, :1], calm))
        assert far.receipt(cache).quality == far.receipt(calm).quality


def test_a_model_called_by_position_is_verified_too() -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        cache = far.new_cache(verify=1)
        forward(model, prompt, cache)
        model(prompt[:, :1], past_key_values=cache)
        quality = far.receipt(cache).quality
        assert quality is not None
        assert quality.steps == 1


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_decoder_within_a_model_is_one_pass(family: str) -> None:
    """What the decoder is called with must be seen to be the model's own pass, in every architecture."""
    model, prompt = make_model(family), make_prompt(1)["input_ids"]
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        seen: list[Any] = []
        hook = far.decoder.register_forward_pre_hook(lambda *args: seen.append(cache._pass))
        forward(model, prompt, cache)
        hook.remove()
        assert [found.module for found in seen] == [id(model)]
        assert cache._pass is None


@pytest.mark.parametrize("fault", ["row", "place", "unmanaged"])
def test_layers_are_compared_before_every_pass(fault: str) -> None:
    model, prompt = make_model("gemma3"), make_prompt(1)["input_ids"]
    with farkv.attach(model, farkv.XKV(fraction=0.5)) as far:
        cache = far.new_cache()
        forward(model, prompt, cache)
        store, last = cache.engine.store, cache.engine.layers[-1]
        if fault == "unmanaged":
            cache.layers[0].cumulative_length -= 1
        else:
            (store.pool[last] if fault == "row" else store.kept[last].places).length -= 1
        with pytest.raises(CacheStateError, match="expected all layers to hold the same tokens, but layer"):
            forward(model, prompt[:, :1], cache)
        cache.reset()
        forward(model, prompt, cache)


def test_a_crop_that_fails_between_two_parts_of_the_last_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers hold the same number of tokens then, and the index of one is longer than its records."""
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB") as far:
        cache = far.new_cache()
        forward(model, prompt, cache)
        store = cache.engine.store

        def fail(now: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(store.windows[cache.engine.layers[-1]], "crop", fail)
            cache.crop(-2)
        assert cache.engine.find_fault() == ""
        with pytest.raises(CacheStateError, match="cropping was stopped half way"):
            forward(model, prompt[:, :1], cache)
