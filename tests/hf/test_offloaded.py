"""Weights that are not in memory: refused in words, whoever keeps them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import farkv
from farkv.errors import UnsupportedModelError
from farkv.methods import Full
from tests.models import generate, make_model, make_prompt


@pytest.mark.parametrize("part", ["model.layers.1", ""], ids=["a layer", "all"])
def test_offloaded_weights_are_refused(part: str) -> None:
    model = copy.deepcopy(make_model("llama"))
    # As accelerate leaves what it offloads: it brings weights in before a module's forward, and takes them away after.
    model.get_submodule(part).to("meta")
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        farkv.attach(model, Full())
    assert model.config._attn_implementation == "sdpa"


def test_hooks_that_bring_nothing_in_are_no_offloading() -> None:
    model, prompt = copy.deepcopy(make_model("llama")), make_prompt(1)
    plain = generate(model, prompt)
    block = model.model.layers[1]
    # The shape of accelerate's hooks: a module's forward is replaced.
    block.forward = functools.partial(block.forward)  # type: ignore[method-assign]
    with farkv.attach(model, Full()) as far:
        ours = generate(model, prompt, far.new_cache())
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
