"""Models with an indexer of their own, at the door: found, followed pass by pass, or refused in words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import farkv
from farkv import Full, InfiniGen, attach
from farkv.errors import CacheStateError, ConfigError, UnsupportedModelError
from farkv.methods import Indexer
from tests.hf.test_refusals import LATENT, build
from tests.models import assert_same, forward, generate, make_model, make_prompt, plain_cache


def knows_indexers() -> bool:
    """Say whether this transformers has the model, and by the name of its layers that a cache goes by."""
    try:
        transformers.Qwen4ExpTextConfig(num_hidden_layers=1, layer_types=["indexed_attention"])
    except (AttributeError, ValueError, TypeError, StrictDataclassError):
        return False
    return True


has_indexer = pytest.mark.skipif(not knows_indexers(), reason="no model with such an indexer")
IDS = make_prompt(tokens=60)["input_ids"]


# --- who has one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_a_model_without_an_indexer_is_refused_in_words(family: str) -> None:
    model = make_model(family)
    with pytest.raises(UnsupportedModelError, match=r"trained with an indexer.*got no layer.*use another method"):
        attach(model, Indexer())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("config", ["DeepseekV32Config", "GlmMoeDsaConfig"])
def test_an_indexer_over_latents_is_refused(config: str, check: bool) -> None:
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    model = build(config, index_topk=4, index_n_heads=2, index_head_dim=16, **LATENT)
    with pytest.raises(UnsupportedModelError, match=r"got (no layer of that type|indexers of another kind)"):
        attach(model, Indexer(), check=check)


@has_indexer
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0), InfiniGen(fraction=0.1)])
def test_other_methods_leave_the_layers_to_the_model_and_say_so(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = make_model("qwen4_exp"), make_prompt(3, tokens=40, pad=9)
    plain = generate(model, prompt)
    with caplog.at_level(logging.WARNING), attach(model, method, near="1MiB") as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)
        assert not any(row.managed for row in far.receipt().layers)
        assert "indexed_attention" in str(far.receipt().layers[0].why)
    assert "farkv.methods.Indexer()" in caplog.text


@has_indexer
def test_a_model_that_also_sees_is_followed_in_its_text() -> None:
    text = make_model("qwen4_exp").config.to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen4ExpConfig(text_config=text, vision_config=vision)
    torch.manual_seed(7)
    model = transformers.Qwen4ExpForConditionalGeneration(config).eval()
    plain = model(input_ids=IDS, past_key_values=plain_cache(model)).logits
    with attach(model, Indexer(), near="1MiB") as far:
        cache = far.new_cache()
        found = [model(input_ids=part, past_key_values=cache).logits for part in IDS.split([50, *[1] * 10], 1)]
        assert far.managed == [0, 1, 2, 3]
    assert (torch.cat(found, 1) - plain).abs().max() < 1e-4


# --- passes -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for Ctrl-C."""


@has_indexer
@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("part", ["indexer", "self_attn", "mlp"])
@pytest.mark.parametrize("n_new", [1, 3])
def test_a_pass_that_stops_anywhere_is_as_if_it_had_not_begun(part: str, near: str | None, n_new: int) -> None:
    model = make_model("qwen4_exp")
    whole = plain_cache(model)
    expected = [forward(model, step, whole) for step in IDS.split([50, *[1] * 10], 1)]
    block = model.model.layers[2]
    module = block.self_attn.indexer if part == "indexer" else getattr(block, part)

    def stop(*args: Any) -> None:
        raise Stopped

    with attach(model, Indexer(), near=near) as far:
        cache = far.new_cache()
        found = [forward(model, IDS[:, :50], cache)]
        for t in range(50, 60):
            hook = module.register_forward_hook(stop)
            with pytest.raises(Stopped):
                forward(model, IDS[:, t - n_new : t], cache)
            hook.remove()
            found.append(forward(model, IDS[:, t : t + 1], cache))
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-4


@has_indexer
def test_cropped_tokens_take_their_keys_and_positions_along() -> None:
    model = make_model("qwen4_exp")
    whole = plain_cache(model)
    expected = torch.cat([forward(model, part, whole) for part in IDS.split([50, *[1] * 10], 1)], 1)
    with attach(model, Indexer()) as far:
        cache = far.new_cache()
        forward(model, IDS[:, :50], cache)
        for t in (3, 9, 20):
            forward(model, IDS[:, t : t + 2], cache)
        cache.crop(-6)
        found = torch.cat([forward(model, part, cache) for part in IDS[:, 50:].split(1, 1)], 1)
        layer = cache.layers[0]
        assert layer.index.keys.length == layer.index.places.length == 60
        assert torch.equal(layer.indexer_position_ids, whole.layers[0].indexer_position_ids)
    assert (found - expected[:, 50:]).abs().max() < 1e-4


@has_indexer
def test_a_cache_whose_model_is_detached_is_refused_where_it_would_take_keys() -> None:
    model = make_model("qwen4_exp")
    with attach(model, Indexer()) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    with pytest.raises(CacheStateError, match="expected a pass of the attached model"):
        forward(model, IDS[:, :1], cache)


@has_indexer
def test_attention_that_is_called_without_a_mask_is_refused() -> None:
    model = make_model("qwen4_exp")
    with attach(model, Indexer()) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        hide = cache.layers[1].note_mask
        cache.layers[1].note_mask = lambda mask: hide(None)
        with pytest.raises(CacheStateError, match="layer 1: expected a mask"):
            forward(model, IDS[:, :1], cache)


@has_indexer
def test_an_indexer_that_cannot_be_asked_for_less_is_refused() -> None:
    model = make_model("qwen4_exp")
    kind = type(model.model.layers[0].self_attn.indexer)
    asked = kind.forward

    def stubborn(self: Any, *args: Any) -> Any:
        self.block_topk, self.token_budget = 4, 16
        return asked(self, *args)

    with attach(model, Indexer(fraction=0.2)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        kind.forward = stubborn
        try:
            with pytest.raises(CacheStateError, match="leave fraction out"):
                forward(model, IDS[:, :1], cache)
        finally:
            kind.forward = asked


@has_indexer
def test_what_makes_the_selector_must_say_what_the_indexer_is() -> None:
    model = make_model("llama")
    with attach(model, Full()) as far:
        place = far.new_cache().engine.selector.place
    with pytest.raises(ConfigError, match="got none"):
        farkv.methods.table.IndexerSelector(Indexer(), place)
