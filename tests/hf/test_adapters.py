"""Adapters: equal to the probe wherever they are used, refused where one comparison proves too little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import farkv
from farkv.hf.adapters import WORDS, is_plain, is_same, mentions_only, project_alone
from farkv.hf.query import Queries, probe_query
from farkv.methods import InfiniGen
from tests.models import COMMON, FAMILIES, generate, make_model, make_prompt

# Its queries may carry a scale that grows with the position.
GENERIC = {"llama4"}
# More structures: norms after attention, interleaved pairs, layers without positions, partial rotary.
MORE: dict[str, dict[str, Any]] = {
    "Olmo2Config": {},
    "CohereConfig": {"use_qk_norm": True},
    "Cohere2Config": {"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"]},
    "GlmConfig": {"head_dim": 8},
    "SmolLM3Config": {},
    "PhiConfig": {},
}


class Watched:
    """Every estimate of a run beside what the probe makes of the same call, and how it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.pairs: list[tuple[Any, Any]] = []
        self.queries: Any = None
        estimate = Queries.estimate

        def both(queries: Any, layer: int, part: Any, args: Any, kwargs: Any, rope: Any) -> Any:
            self.queries = queries
            got = estimate(queries, layer, part, args, kwargs, rope)
            self.pairs.append((got, probe_query(part, args, kwargs, rope)))
            return got

        monkeypatch.setattr(Queries, "estimate", both)

    def forms(self) -> list[Any]:
        return [None if found is None else found.form for found in self.queries._adapters.values()]

    def check(self) -> None:
        is_split = any(form is not None and form.project is not project_alone for form in self.forms())
        assert self.pairs, "nothing was speculated"
        for got, probed in self.pairs:
            assert is_same(got.q, probed.q, 32, is_split=is_split)
            assert got[1:] == probed[1:]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def run(model: Any, between: Callable[[Any], None] | None = None, **options: Any) -> Any:
    """Decode some steps, change the model, decode some more; return the receipt."""
    with farkv.attach(model, InfiniGen(fraction=0.3, **options), near="1MiB") as far:
        prompt = make_prompt(2, pad=5)
        made = generate(model, prompt, cache := far.new_cache(), n=4).sequences
        if between is not None:
            between(model)
            mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 4), value=1)
            # What was read before is another model's.
            cache = far.new_cache()
            generate(model, {"input_ids": made, "attention_mask": mask}, cache, n=4)
        return far.receipt(cache)


CALLS = [(family, "post_attn") for family in FAMILIES if family != "mistral_sliding"]
CALLS += [(family, source) for family in ("llama", "opt", "gpt_neox", "lfm2") for source in ("residual", "attn")]


@pytest.mark.parametrize(("family", "source"), CALLS)
def test_every_family(family: str, source: Any, watched: Watched) -> None:
    receipt = run(make_model(family), source=source)
    watched.check()
    generic = sum(form is None for form in watched.forms())
    assert generic == (len(watched.forms()) if family in GENERIC else 0)
    assert receipt.fallbacks.get("generic_query", 0) == generic


@pytest.mark.parametrize("name", MORE)
def test_more_structures(name: str, watched: Watched) -> None:
    config = getattr(transformers, name)(**{**COMMON, **MORE[name]})
    config.eos_token_id = None
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    receipt = run(model)
    watched.check()
    assert None not in watched.forms()
    assert "generic_query" not in receipt.fallbacks


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt_oss"])
def test_bfloat16(family: str, watched: Watched) -> None:
    run(copy.deepcopy(make_model(family)).to(torch.bfloat16))
    watched.check()
    assert None not in watched.forms()


def test_keys_and_values_are_not_projected_for_an_estimate() -> None:
    model = copy.deepcopy(make_model("llama"))
    calls: list[str] = []
    attention = model.model.layers[2].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB") as far:
        generate(model, make_prompt(1), far.new_cache(), n=6)
    # A prompt and five steps. The first step is estimated in both ways; before the probe no keys are asked for.
    assert calls.count("k_proj") == calls.count("v_proj") == 6 + 1
    assert calls.count("q_proj") == 6 + 5 + 1


class LoRA(nn.Module):
    """A projection with a low-rank part beside it."""

    def __init__(self, base: nn.Module, n_in: int, n_out: int):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(n_in, 2), nn.Linear(2, n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def add_lora(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, 32, 32)


def swap_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm = nn.LayerNorm(32)


def change_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


def hook_projections(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "qkv_proj", "query_key_value")):
            module.register_forward_hook(lambda module, args, out: 1.5 * out)


def hook_attention(model: Any) -> None:
    def double(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(double, with_kwargs=True)


def patch_forward(model: Any) -> None:
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda hidden_states, forward=forward, **kwargs: forward(3 * hidden_states, **kwargs)


def rescale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


CHANGES = [add_lora, swap_norms, change_weights, hook_projections, hook_attention, patch_forward, rescale]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_gets_its_own_estimates(change: Any, watched: Watched) -> None:
    model = copy.deepcopy(make_model("llama"))
    run(model, change)
    watched.check()
    before, after = watched.pairs[0][0], watched.pairs[-1][0]
    assert before.q.shape == after.q.shape


@pytest.mark.parametrize("change", [hook_projections, change_weights])
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_a_changed_fused_projection(family: str, change: Any, watched: Watched) -> None:
    run(copy.deepcopy(make_model(family)), change)
    watched.check()


def test_what_mentions_more_is_left_to_the_probe() -> None:
    class Plain(nn.Module):
        def forward(self, x: Any) -> Any:
            return self.q_proj(x)  # type: ignore[operator]

    class Clamped(nn.Module):
        def forward(self, x: Any) -> Any:
            return self.q_proj(x).clamp(-1, 1)  # type: ignore[operator]

    patched = Plain()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert mentions_only(Plain(), WORDS)
    assert not mentions_only(Clamped(), WORDS)
    assert not mentions_only(patched, WORDS)


def test_rows_are_taken_of_bare_projections_alone() -> None:
    class Other(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda module, args: None)
    assert is_plain(nn.Linear(4, 4))
    assert not any(is_plain(m) for m in (hooked, Other(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_means_equal(dtype: torch.dtype) -> None:
    q = torch.linspace(-1, 1, 64, dtype=dtype).view(1, 2, 1, 32)
    eps = torch.finfo(dtype).eps
    assert is_same(q, q.clone(), 64, is_split=False)
    assert not is_same(q, q * (1 + 2 * eps), 64, is_split=False)
    assert is_same(q, q * (1 + 2 * eps), 64, is_split=True)
    assert not is_same(q, q * (1 + 50 * eps), 64, is_split=True)
    assert not is_same(q, q[:, :1], 64, is_split=True)
    assert not is_same(q, q.double(), 64, is_split=True)
