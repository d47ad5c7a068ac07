"""Queries ahead of their layer: equal to the true query for the true hidden state, whatever the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import farkv
from farkv.hf import query
from farkv.hf.query import Queries, Rope, add_attention, hidden_of, probe_query, with_hidden
from farkv.methods import Full, InfiniGen
from tests.models import FAMILIES, forward, generate, make_model, make_prompt

LAYER = 3


def catch(model: Any, ids: torch.Tensor, cache: Any) -> tuple[dict[str, Any], Any]:
    """Return one layer's call and its true query at a decode step."""
    block, seen = model.model.layers[LAYER], {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen["call"] = (args, dict(kwargs))

    attend = cache.engine.attend

    def watch(layer: int, step: Any, kernel: Any) -> Any:
        if layer == LAYER:
            seen["query"] = step.query
        return attend(layer, step, kernel)

    cache.engine.attend = watch
    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    forward(model, ids, cache)
    hook.remove()
    return seen["call"], seen["query"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "granite", "gpt_oss", "qwen3_moe"])
def test_the_true_hidden_state_gives_the_true_query(family: str) -> None:
    model = make_model(family)
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        ids = make_prompt(2)["input_ids"]
        forward(model, ids[:, :-1], cache)
        (args, kwargs), true = catch(model, ids[:, -1:], cache)
        queries, block = Queries(far.attention), model.model.layers[LAYER]
        # The first is the probe's, the second an adapter's.
        for _ in range(2):
            got = queries.estimate(LAYER, block, args, kwargs, None)
            assert got is not None
            assert (got.q - true.q).abs().max() <= 1e-5 * true.q.abs().max()
            assert got[1:] == true[1:]
    assert queries.n_generic == 0


def test_the_probe_is_asked_once_per_layer_and_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[nn.Module] = []

    def count(part: nn.Module, *args: Any) -> Any:
        probes.append(part)
        return probe_query(part, *args)

    monkeypatch.setattr(query, "probe_query", count)
    model = copy.deepcopy(make_model("llama"))
    with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB") as far:
        generate(model, make_prompt(1), far.new_cache(), n=6)
        assert probes == list(model.model.layers[1:])
        generate(model, make_prompt(1), far.new_cache(), n=6)
        assert len(probes) == 3
        model.model.layers[2].self_attn.scaling *= 2
        generate(model, make_prompt(1), cache := far.new_cache(), n=6)
        assert probes[3:] == [model.model.layers[2]]
        assert "generic_query" not in far.receipt(cache).fallbacks


def test_a_layer_without_an_adapter_is_counted_in_every_receipt() -> None:
    model = make_model("llama4")
    with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB") as far:
        for _ in range(2):
            generate(model, make_prompt(1), cache := far.new_cache(), n=5)
            # Layers 1 and 3 are managed, and each has a layer before it.
            assert far.receipt(cache).fallbacks["generic_query"] == 2


def test_a_near_store_asks_for_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("estimated in vain")

    monkeypatch.setattr(Queries, "estimate", refuse)
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        generate(model, make_prompt(1), far.new_cache(), n=4)


def test_no_hooks_where_nothing_is_speculated() -> None:
    model = make_model("llama")

    def count(method: Any, near: str | None, n_caches: int) -> tuple[list[int], list[int]]:
        with farkv.attach(model, method, near=near) as far:
            for _ in range(n_caches):
                far.new_cache()
            blocks = [len(block._forward_pre_hooks) for block in model.model.layers]
            return blocks, [len(block.self_attn._forward_hooks) for block in model.model.layers]

    # Records that do not travel need no estimate, nor does a handle that has no cache yet.
    for nothing in ((Full(), "1MiB", 1), (InfiniGen(), None, 1), (InfiniGen(), "1MiB", 0)):
        assert count(*nothing) == ([0] * 4, [0] * 4)
    for n_caches in (1, 2):
        assert count(InfiniGen(), "1MiB", n_caches) == ([1, 1, 1, 0], [1, 1, 1, 0])
    assert count(InfiniGen(), None, 0) == ([0] * 4, [0] * 4), "detached"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith("gemma")])
def test_sandwich_norms_and_factors_are_part_of_the_sum(family: str) -> None:
    block = make_model(family).model.layers[0]
    h, a = torch.randn(2, 1, 1, 32)
    assert torch.equal(add_attention(block, h, a), h + block.post_attention_layernorm(a))


def test_residual_factors_are_part_of_the_sum() -> None:
    block = make_model("granite").model.layers[0]
    h, a = torch.randn(2, 1, 1, 32)
    assert torch.equal(add_attention(block, h, a), h + 0.7 * a)


def test_hidden_states_by_place_and_by_name() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert hidden_of((x, 1), {}) is x
    assert hidden_of((), {"hidden_states": x}) is x
    assert with_hidden((x, 1), {"a": 2}, y) == ((y, 1), {"a": 2})
    assert with_hidden((), {"hidden_states": x, "a": 2}, y) == ((), {"hidden_states": y, "a": 2})


def test_tables_of_a_layer_type_or_of_all() -> None:
    rope, module = Rope(), nn.Module()
    rope.note(module, (0, 0), {}, "of all")
    assert rope.get("full_attention") == "of all"
    rope.note(module, (0, 0, "full_attention"), {}, "by place")
    rope.note(module, (0, 0), {"layer_type": "sliding_attention"}, "by name")
    assert rope.get("full_attention") == "by place"
    assert rope.get("sliding_attention") == "by name"
