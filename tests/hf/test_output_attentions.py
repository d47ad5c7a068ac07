"""Attention weights: those of the plain model where every record is read, else a refusal in words."""

from __future__ import annotations

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.methods import XKV, Full, InfiniGen, Method
from tests.models import generate, make_model, make_prompt, plain_cache

PROMPT = make_prompt(1, tokens=24)
IDS = PROMPT["input_ids"]
MODEL = {"implementation": "eager"}


@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0)])
def test_whole_they_are_the_plain_models(method: Method) -> None:
    model = make_model("llama", **MODEL)
    plain = generate(model, PROMPT, n=3, output_attentions=True).attentions
    with farkv.attach(model, method) as far:
        ours = generate(model, PROMPT, far.new_cache(), n=3, output_attentions=True).attentions
    assert all(torch.equal(a, b) for one, two in zip(ours, plain, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("method", [InfiniGen(fraction=0.3), XKV(fraction=0.5)])
def test_of_a_choice_there_are_none(method: Method) -> None:
    model = make_model("llama", **MODEL)
    with farkv.attach(model, method) as far:
        with pytest.raises(CacheStateError, match="output_attentions"):
            generate(model, PROMPT, far.new_cache(), n=3, output_attentions=True)
        cache = far.new_cache()
        model(IDS, past_key_values=cache)
        with pytest.raises(CacheStateError, match="output_attentions"):
            model(IDS[:, :1], past_key_values=cache, output_attentions=True)
        assert cache.get_seq_length() == IDS.shape[1]
        model(IDS[:, :1], past_key_values=cache)


def test_a_prompt_is_read_whole() -> None:
    model = make_model("llama", **MODEL)
    plain = model(IDS, past_key_values=plain_cache(model), output_attentions=True).attentions
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        ours = model(IDS, past_key_values=far.new_cache(), output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
