"""Latent attention: latents are stored and chosen, and expanded by the model's own code before its own attention."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import farkv
from farkv.errors import CacheStateError, CapacityError, UnsupportedModelError
from farkv.hf.latents import find_latents
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Method, Oracle, Pages, Random, SnapKV, Window
from tests.hf.tape import Tape, check_replay
from tests.hf.test_refusals import LATENT, build
from tests.models import assert_same, forward, generate, make_prompt, plain_cache

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2Config", {}),
    "deepseek_v3": ("DeepseekV3Config", {}),
    "deepseek_v3_one_query_map": ("DeepseekV3Config", {"q_lora_rank": None}),
    "minicpm3": ("MiniCPM3Config", {}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {}),
    "youtu": ("YoutuConfig", {}),
    "axk1": ("AXK1Config", {}),
}
MAIN = ("deepseek_v2", "deepseek_v3")
# Of one token in one layer, as numbers: the latent, and the key that is rotated.
WIDTH = 16 + 8
SINGLE, PADDED = make_prompt(1, tokens=40), make_prompt(3, tokens=40, pad=16)
NEAR = pytest.mark.parametrize("near", [None, "1MiB"])


@cache
def make(family: str = "deepseek_v3") -> PreTrainedModel:
    name, own = FAMILIES[family]
    return build(name, **{**LATENT, **own})


def compare(model: PreTrainedModel, method: Method, prompt: Any, near: str | None = None, **options: Any) -> Any:
    """Assert that it equals the plain model bit for bit; return the receipt."""
    plain = generate(model, prompt, plain_cache(model), **options)
    with farkv.attach(model, method, near=near) as far:
        assert_same(generate(model, prompt, far.new_cache(), **options), plain)
        return far.receipt()


# --- everything is read -----------------------------------------------------------------------------------------------


@NEAR
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_everything_equals_the_plain_model(family: str, near: str | None) -> None:
    model = make(family)
    receipt = compare(model, Full(), SINGLE, near)
    assert receipt.exact == "bit"
    compare(model, InfiniGen(fraction=1.0), PADDED, near, num_beams=3)
    compare(model, InfiniGen(fraction=1.0), SINGLE, near, prefill_chunk_size=7)


@NEAR
@pytest.mark.parametrize("method", [InfiniGen(fraction=1.0, paper=True), LowBit(fraction=1.0), H2O(fraction=1.0)])
def test_so_does_every_method(method: Method, near: str | None) -> None:
    compare(make(), method, PADDED, near, num_beams=2, prefill_chunk_size=9)


@pytest.mark.parametrize("family", MAIN)
def test_so_it_does_in_bfloat16_and_on_eager_attention(family: str) -> None:
    name, own = FAMILIES[family]
    model = build(name, **{**LATENT, **own}).to(torch.bfloat16)
    compare(model, InfiniGen(fraction=1.0), PADDED)
    model = build(name, **{**LATENT, **own})
    model.set_attn_implementation("eager")
    assert compare(model, Full(), PADDED, "1MiB").kernel.split("+")[-1] == "torch-eager"


@NEAR
def test_prompt_lookup_and_a_second_turn(near: str | None) -> None:
    model, ids = make(), make_prompt(1, tokens=50)["input_ids"]
    compare(model, InfiniGen(fraction=1.0), SINGLE, near, prompt_lookup_num_tokens=3)
    pieces = (ids[:, :30], *ids[:, 30:34].split(1, 1), ids[:, 34:40], *ids[:, 40:44].split(1, 1))
    plain = plain_cache(model)
    expected = [forward(model, piece, plain) for piece in pieces]
    with farkv.attach(model, InfiniGen(fraction=1.0), near=near) as far:
        cache = far.new_cache()
        got = [forward(model, piece, cache) for piece in pieces]
        cache.crop(-10)
        again = [forward(model, piece, cache) for piece in pieces[5:]]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, expected[5:], strict=True))


# --- some records are read --------------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "ours": InfiniGen(fraction=0.3),
    "paper": InfiniGen(fraction=0.45, paper=True),
    "top_p": InfiniGen(fraction=0.4, top_p=0.6),
    "burst": InfiniGen(fraction=0.3, burst=4),
    "window": Window(fraction=0.3),
    "random": Random(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "pages": Pages(fraction=0.3, page=8),
    "lowbit": LowBit(fraction=0.3),
}


def replay(model: PreTrainedModel, method: Method, prompt: Any, near: str | None = None, **options: Any) -> None:
    reference = copy.deepcopy(model)
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=5, **options)
    check_replay(reference, tape)


@NEAR
@pytest.mark.parametrize("method", METHODS)
def test_what_is_chosen_is_read_as_the_plain_model_would(method: str, near: str | None) -> None:
    replay(make(), METHODS[method], PADDED, near)


@NEAR
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str, near: str | None) -> None:
    replay(make(family), METHODS["ours"], SINGLE, near)
    replay(make(family), METHODS["ours"], make_prompt(2, tokens=40, pad=16), near, num_beams=3)


@pytest.mark.parametrize("method", [XKV(fraction=0.5), SnapKV(fraction=0.5, window=4), H2O(fraction=0.5)])
def test_what_stays_after_an_eviction_is_read_as_the_plain_model_would(method: Method) -> None:
    model = make()
    reference = copy.deepcopy(model)
    with farkv.attach(model, method) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, SINGLE, cache, n=5)
        assert far.receipt().kept_fraction <= 0.5
    check_replay(reference, tape)


def test_an_estimate_made_ahead_is_the_query_that_scores_latents() -> None:
    model, ids = make(), make_prompt(1, tokens=41)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.3, top_up=0.0), near="1MiB") as far:
        cache, seen = far.new_cache(), []
        speculate = cache.engine.speculate
        cache.engine.speculate = lambda layer, query: seen.append((layer, query.q)) or speculate(layer, query)
        for piece in (ids[:, :40], ids[:, 40:]):
            forward(model, piece, cache)
        receipt = far.receipt()
    assert [layer for layer, _ in seen] == [1, 2, 3]
    assert all(q.shape == (1, 4, 1, WIDTH) for _, q in seen)
    # The block is run up to its attention call: there is no adapter for a query of two maps.
    assert receipt.fallbacks == {"generic_query": 3}
    assert 0 < receipt.fetched_bytes_per_token < 0.3 * receipt.kv_bytes.total


# --- where they are stored --------------------------------------------------------------------------------------------

TOKENS, NEW = 300, 4
TEXT = make_prompt(1, tokens=TOKENS + NEW)["input_ids"]
PARTS = (TEXT[:, :120], TEXT[:, 120:TOKENS], *TEXT[:, TOKENS:].split(1, 1))
LAYER = (TOKENS + NEW) * WIDTH * 4


def read(model: PreTrainedModel, parts: Any, cache: Any) -> torch.Tensor:
    return torch.cat([forward(model, part, cache) for part in parts], 1)


def test_the_receipt_counts_the_bytes_of_latents() -> None:
    model = make()
    plain = plain_cache(model)
    read(model, PARTS, plain)
    with farkv.attach(model, InfiniGen(fraction=0.1)) as far:
        read(model, PARTS, far.new_cache())
        receipt = far.receipt()
    layers: list[Any] = plain.layers
    assert (
        receipt.kv_bytes.total == 4 * LAYER == sum(4 * t.numel() for each in layers for t in (each.keys, each.values))
    )
    assert receipt.read_fraction <= 0.1
    assert any("4 of 4 managed layers store latents" in note for note in receipt.notes)


@pytest.mark.parametrize("place", [{"near": "400KiB"}, {"disk": "1GiB"}, {"disk": "1GiB", "near": "600KiB"}])
def test_in_every_tier_everything_is_read_bit_for_bit(place: dict[str, str], tmp_path: Path) -> None:
    model = make()
    expected = read(model, PARTS, plain_cache(model))
    limits = {k: f"{tmp_path}:{v}" if k == "disk" else v for k, v in place.items()}
    with farkv.attach(model, Full(), **limits) as far:
        assert torch.equal(read(model, PARTS, far.new_cache()), expected)
        assert far.receipt().exact == "bit"


@pytest.mark.parametrize("limits", [{"near": "128KiB"}, {"near": "128KiB", "quant": "int8"}, {"quant": "int4"}])
def test_where_they_do_not_fit_expanded_latents_are_read_in_blocks(limits: dict[str, Any]) -> None:
    model, double = make(), copy.deepcopy(make()).double()
    double.set_experts_implementation("eager")
    exact = read(double, PARTS, plain_cache(double))
    with farkv.attach(model, Full(), **limits) as far:
        ours = read(model, PARTS, far.new_cache())
        receipt = far.receipt()
    noise = (read(model, PARTS, plain_cache(model)) - exact).abs().max()
    off = (ours - exact).abs().max()
    assert receipt.kv_bytes.near_peak <= (receipt.limits.near or 2**40)
    if receipt.quant.max_error is None:
        assert receipt.exact == "rounding"
        assert off <= 8 * noise
    else:
        assert 0 < receipt.quant.max_error < 0.3
        assert receipt.exact == "no"
        assert noise < off < 200 * receipt.quant.max_error


def test_what_a_choice_expands_to_counts_as_near_memory() -> None:
    model = make()
    with farkv.attach(model, InfiniGen(fraction=0.5), near="1MiB") as far:
        cache = far.new_cache()
        read(model, PARTS[:2], cache)
        cache.engine.store.near.peak = 0
        read(model, PARTS[2:], cache)
        # A record is 24 numbers, its four keys and values are 112.
        assert cache.engine.store.near.peak >= TOKENS // 2 * 112 * 4
    with farkv.attach(model, InfiniGen(fraction=0.5), near="64KiB") as far, pytest.raises(CapacityError):
        read(model, PARTS, far.new_cache())


@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=0.3), LowBit(fraction=0.3)])
def test_a_session_holds_latents(method: Method, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a.farkv"
    expected = read(model, PARTS, plain_cache(model))[:, TOKENS:]
    with farkv.attach(model, method) as far:
        cache = far.new_cache()
        read(model, PARTS[:2], cache)
        cache.save(path)
        answers = [read(model, PARTS[2:], farkv.load_cache(path, model)) for _ in range(2)]
    assert torch.equal(*answers)
    assert path.stat().st_size < 8 * LAYER
    if isinstance(method, Full):
        assert torch.equal(answers[0], expected)


@NEAR
def test_verified_steps_compare_with_all_latents(near: str | None) -> None:
    found = {}
    for name, method in {"all": Full(), "best": Oracle(fraction=0.3), "newest": Window(fraction=0.3)}.items():
        with farkv.attach(make(), method, near=near) as far:
            cache = far.new_cache(verify=NEW)
            read(make(), PARTS, cache)
            found[name] = far.receipt().quality
    assert found["all"].kl_mean == 0 and found["all"].mass_mean == 1
    assert found["newest"].mass_mean < found["best"].mass_mean < 1
    assert found["best"].kl_mean > 0


def test_a_profile_measures_the_queries_that_score_latents() -> None:
    model = copy.deepcopy(make())
    measured = farkv.profile(model, [make_prompt(1, tokens=80, seed=s)["input_ids"][0] for s in (3, 4)])
    with farkv.attach(model, InfiniGen(fraction=0.45, paper=True), profile=measured) as far:
        read(model, PARTS, far.new_cache())
        assert far.receipt().fallbacks == {"generic_query": 3}, "the skew is the profile's"


# --- what is looked at ------------------------------------------------------------------------------------------------


def make_own(**changes: Any) -> Any:
    """Return a model that a test may change."""
    return build("DeepseekV3Config", **{**LATENT, **changes})


def test_an_expansion_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farkv.hf.look._known", set())
    model = make_own()
    for block in model.model.layers:
        up = block.self_attn.kv_b_proj
        block.self_attn.kv_b_proj = torch.nn.Linear(up.in_features, up.out_features)
    assert find_latents(model.model.layers[0].self_attn) is None
    with pytest.raises(UnsupportedModelError, match="other keys or values than those it gives the cache"):
        farkv.attach(model, Full())


def turn(module: Any) -> None:
    """Let an attention put the rotated part of its keys first."""
    expand = module.expand_kv

    def turned(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = expand(latent, rotated)
        return k.roll(module.qk_rope_head_dim, -1), v

    module.expand_kv = turned


@pytest.mark.parametrize("check", [True, False])
def test_keys_that_latents_do_not_score_are_refused(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farkv.hf.look._known", set())
    model, kind = make_own(), (CacheStateError, UnsupportedModelError)[check]
    for block in model.model.layers:
        turn(block.self_attn)
    with pytest.raises(kind, match="a score off by"), farkv.attach(model, Full(), check=check) as far:
        forward(model, TEXT[:, :24], far.new_cache())


@pytest.mark.parametrize("config", ["DeepseekV32Config", "GlmMoeDsaConfig"])
def test_an_attention_with_an_indexer_is_none_of_this_kind(config: str) -> None:
    model: Any = build(config, **LATENT, index_n_heads=2, index_head_dim=8, index_topk=8)
    assert find_latents(model.model.layers[0].self_attn) is None


def test_of_packed_maps_the_expansion_is_found_by_unit_vectors() -> None:
    model: Any = make_own()
    module = model.model.layers[0].self_attn
    form, q = find_latents(module), torch.randn(2, 4, 1, 16)
    assert form is not None
    absorbed = form.absorb(module, q)

    class Packed(torch.nn.Module):
        """A map without weights that could be read."""

        def __init__(self, source: torch.nn.Linear):
            super().__init__()
            self.in_features, self.out_features, self.bias = source.in_features, source.out_features, None
            self.run = source.forward

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x)

    for block in model.model.layers:
        block.self_attn.kv_b_proj = Packed(block.self_attn.kv_b_proj)
    torch.testing.assert_close(form.absorb(module, q), absorbed)
    plain = generate(model, SINGLE, plain_cache(model))
    with farkv.attach(model, InfiniGen(fraction=1.0), near="1MiB") as far:
        assert_same(generate(model, SINGLE, far.new_cache()), plain)


def test_a_model_is_as_it_was() -> None:
    model = make()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    farkv.attach(model, Full()).detach()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("config", ["KimiLinearConfig", "BailingHybridConfig"])
def test_of_hybrids_the_layers_of_latents_are_managed(config: str) -> None:
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    kinds = ["linear_attention", "full_attention"] * 2
    model = build(config, **{**LATENT, "layer_types": kinds, "head_dim": 8})
    receipt = compare(model, InfiniGen(fraction=1.0), make_prompt(1, tokens=12), "1MiB")
    assert [row.managed for row in receipt.layers] == [False, True] * 2
    assert any("2 of 2 managed layers store latents" in note for note in receipt.notes)
