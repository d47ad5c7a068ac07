"""What strangers do in their first week: it equals plain Hugging Face, or is refused in words. Nothing is silent."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import farkv
from farkv import Full, InfiniGen, attach
from farkv.errors import CacheStateError, ConfigError, SessionError, UnsupportedModelError
from farkv.hf import _compat
from farkv.hf.identity import digest_tensors, identify_model
from farkv.hf.query import add_attention
from farkv.methods import H2O, LowBit, Pages
from tests.models import COMMON, forward, generate, make_model, make_prompt, plain_cache

LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
    n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1,
    num_experts_per_tok=2,
)  # fmt: skip


def build(config: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model of its own, of any configuration class."""
    values = {k: v for k, v in {**COMMON, **changes}.items() if v is not None}
    made = getattr(transformers, config)(**values)
    made.eos_token_id = made.bos_token_id = None
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(made).eval()


def draw(tokens: int, seed: int = 1) -> Tensor:
    return make_prompt(tokens=tokens, seed=seed)["input_ids"]


# --- models that are not what we assume -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["DiffLlamaConfig", "JetMoeConfig"])
def test_values_that_are_arranged_anew_are_refused_at_attach(config: str) -> None:
    model = build(config)
    plain = forward(model, draw(24), plain_cache(model))
    with pytest.raises(UnsupportedModelError, match="cannot be managed"):
        attach(model)
    assert torch.equal(forward(model, draw(24), plain_cache(model)), plain)


def test_without_the_look_the_first_pass_refuses_them() -> None:
    model = build("DiffLlamaConfig")
    with attach(model, Full(), check=False) as far, pytest.raises(CacheStateError, match="cannot be managed"):
        forward(model, draw(24), far.new_cache())


@pytest.mark.parametrize("config", ["DeepseekV32Config", "GlmMoeDsaConfig"])
def test_a_model_that_asks_for_the_names_of_attention_is_refused(config: str) -> None:
    model = build(config, **LATENT, index_n_heads=2, index_head_dim=8, index_topk=8)
    with pytest.raises(UnsupportedModelError, match="asks for the attention implementation's name"):
        attach(model, Full())


def test_a_model_is_looked_at_once_and_is_left_in_the_mode_it_was_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farkv.hf.look._known", set())
    model, calls = build("LlamaConfig"), []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    for _ in range(2):
        attach(model).detach()
    hook.remove()
    assert len(calls) == 6, "two passes before, two with an ordinary cache, two with ours; then none"
    assert all(module.training for module in model.modules())


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV4Config"), reason="a model of newer releases")
def test_an_ordinary_cache_is_looked_at_also_where_nothing_is_managed() -> None:
    types = ["heavily_compressed_attention"] * 3 + ["compressed_sparse_attention"]
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, o_groups=1, o_lora_rank=16)
    heads = dict(head_dim=16, q_lora_rank=16, index_n_heads=2, index_head_dim=16, index_topk=8, num_key_value_heads=1)
    model = build("DeepseekV4Config", layer_types=types, sliding_window=16, **experts, **heads)
    with pytest.raises(UnsupportedModelError, match="an ordinary cache a few tokens come out otherwise"):
        attach(model, Full())


def test_blocks_in_a_module_that_takes_no_ids_are_looked_at_by_what_is_around_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("BertConfig", is_decoder=True, num_key_value_heads=None)
    plain = forward(model, draw(24), plain_cache(model))
    with attach(model, Full()) as far:
        assert torch.equal(forward(model, draw(24), far.new_cache()), plain)
    assert "could not be looked at" not in caplog.text


def test_a_configuration_that_does_not_say_how_many_layers_it_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("LlamaConfig")
    monkeypatch.setattr("farkv.hf._compat.text_config", lambda _: object())
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks"):
        attach(model, Full())


def test_a_model_that_takes_a_cache_of_its_own_kind_alone_is_refused() -> None:
    kinds = ["linear_attention", "full_attention"] * 2
    model = build("MiniMaxConfig", layer_types=kinds, head_dim=8, num_local_experts=2, block_size=8)
    with pytest.raises(UnsupportedModelError, match="with a cache of its own kind alone"):
        attach(model, Full())
    assert model.config._attn_implementation == "sdpa"


def test_whether_sdpa_is_supported_the_text_says_where_a_model_has_several_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("LlamaConfig")
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    assert _compat.supports_sdpa(model, model.model)
    assert not _compat.supports_sdpa(model, model.model.layers), "no model of its own"


def test_a_model_of_many_embeddings_has_an_identity_too() -> None:
    model = build("LlamaConfig")
    before = identify_model(model)
    model.get_input_embeddings = lambda: nn.ModuleList([model.model.embed_tokens])  # type: ignore[method-assign]
    assert identify_model(model)["weights"] == before["weights"], "its first parameter is the embedding"


def test_where_layers_differ_in_heads_the_most_counts() -> None:
    config = transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=4)
    assert _compat.count_groups(config) == 2
    if hasattr(config, "is_heterogeneous"):
        config.per_layer_config = {1: {"num_key_value_heads": 1, "head_dim": 16}}
        assert _compat.count_groups(config) == 8
        config.layer_types = ["sliding_attention", "full_attention"] * 16
        assert _compat.describe_heads(config) == (1, 16, 8), "of the layer that is managed"


@pytest.mark.parametrize(
    ("config", "changes", "after"),
    [
        ("LlamaConfig", {}, "post_attention_layernorm"),
        ("Olmo2Config", {}, "mlp"),
        ("Olmo3Config", {}, "mlp"),
        ("Exaone4Config", {"layer_types": ["full_attention"] * 4}, "mlp"),
        ("Glm4Config", {"head_dim": 8}, "post_attention_layernorm"),
        ("Gemma2Config", {"head_dim": 8}, "pre_feedforward_layernorm"),
        ("VaultGemmaConfig", {"head_dim": 8, "sliding_window": 16}, "pre_feedforward_layernorm"),
        ("GraniteConfig", {"residual_multiplier": 0.7}, "post_attention_layernorm"),
    ],
)
def test_what_comes_out_of_attention_is_added_as_the_block_adds_it(config: str, changes: Any, after: str) -> None:
    model, seen = build(config, **changes), {}
    block: Any = model.model.layers[1]
    for weight in block.parameters():
        weight.data += 0.1
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, k: seen.update(h=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
        block.self_attn.register_forward_hook(lambda m, a, out: seen.update(attention=out[0])),
        getattr(block, after).register_forward_pre_hook(lambda m, a: seen.update(true=a[0])),
    ]
    with torch.no_grad():
        model(input_ids=draw(24))
        off = add_attention(block, seen["h"], seen["attention"]) - seen["true"]
    for hook in hooks:
        hook.remove()
    assert off.norm() <= 1e-5 * seen["true"].norm()


def test_a_norm_before_the_mlp_alone_runs_near() -> None:
    model, prompt = build("VaultGemmaConfig", head_dim=8, sliding_window=16), make_prompt(tokens=40)
    plain = generate(model, prompt, plain_cache(model))
    with attach(model, InfiniGen(fraction=1.0), near="1MiB") as far:
        found = generate(model, prompt, far.new_cache())
    assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=1.0), InfiniGen()])
def test_a_mask_of_numbers_that_only_hides_is_followed(method: Any, near: str | None) -> None:
    model, ids = make_model("llama"), draw(24)
    mask = torch.full((1, 1, 24, 24), -torch.inf).triu(1)
    mask[..., 6:, 3:6] = -torch.inf
    step = torch.zeros(1, 1, 1, 25)
    step[..., 3:6] = -torch.inf

    @torch.no_grad()
    def run(cache: Any) -> Tensor:
        first = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        return torch.cat([first, model(input_ids=ids[:, :1], attention_mask=step, past_key_values=cache).logits], 1)

    plain = run(plain_cache(model))
    with attach(model, method, near=near) as far:
        torch.testing.assert_close(run(far.new_cache()), plain, atol=1e-4, rtol=1e-4)


def test_numbers_that_are_added_to_logits_are_followed_where_all_is_read_and_else_refused() -> None:
    model, ids = make_model("llama"), draw(24)
    step = torch.linspace(-2, 0, 25).view(1, 1, 1, 25)

    @torch.no_grad()
    def run(cache: Any) -> Tensor:
        model(input_ids=ids, past_key_values=cache)
        return model(input_ids=ids[:, :1], attention_mask=step, past_key_values=cache).logits

    plain = run(plain_cache(model))
    with attach(model, Full()) as far:
        assert torch.equal(run(far.new_cache()), plain)
    for method in (InfiniGen(fraction=0.3), H2O(fraction=0.5)):
        with attach(model, method) as far, pytest.raises(CacheStateError, match="numbers that are added to logits"):
            run(far.new_cache())


@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=0.3), Pages(fraction=0.3, page=4)])
def test_the_mask_of_one_pass_is_forgotten_with_it(method: Any) -> None:
    # One layer: what it stores does not depend on masks, so later steps must not either.
    model, ids = build("LlamaConfig", num_hidden_layers=1), draw(60)
    hide = torch.ones(1, 1, 2, 62, dtype=torch.bool)
    hide[..., 60:] = torch.ones(2, 2, dtype=torch.bool).tril()
    hide[..., 10:50] = False

    @torch.no_grad()
    def run(cache: Any, mask: Tensor | None) -> Tensor:
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :2], attention_mask=mask, past_key_values=cache)
        return torch.cat([forward(model, ids[:, i : i + 1], cache) for i in (5, 6, 7)], 1)

    with attach(model, method) as far:
        torch.testing.assert_close(run(far.new_cache(), hide), run(far.new_cache(), None), atol=1e-3, rtol=0)


# --- whose session it is ----------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, ids: Tensor, path: Path) -> None:
    with attach(model, Full()) as far, torch.no_grad():
        cache = far.new_cache()
        forward(model, ids, cache)
        cache.save(path)


def refuse_session(model: PreTrainedModel, path: Path, what: str) -> None:
    with attach(model, Full()), pytest.raises(SessionError, match=what):
        farkv.load_cache(path, model)


def test_a_session_is_of_one_rotary_scaling(tmp_path: Path) -> None:
    first = build("LlamaConfig")
    other = build("LlamaConfig", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    other.load_state_dict(first.state_dict())
    save(first, draw(80), tmp_path / "text.farkv")
    refuse_session(other, tmp_path / "text.farkv", "buffers.*configuration")
    with attach(first, Full()):
        assert farkv.load_cache(tmp_path / "text.farkv", first).get_seq_length() == 80


class Adapted(nn.Module):
    """A projection with two low-rank adapters, of which one is active."""

    def __init__(self, base: Any):
        super().__init__()
        self.base, self.active = base, "a"
        self.down = nn.ParameterDict({k: torch.randn(4, base.in_features) * 0.3 for k in "ab"})
        self.up = nn.ParameterDict({k: torch.randn(base.out_features, 4) * 0.3 for k in "ab"})

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down[self.active].T @ self.up[self.active].T


def test_a_session_is_of_one_adapter_and_of_the_weights_as_they_are(tmp_path: Path) -> None:
    model: Any = build("LlamaConfig")
    for block in model.model.layers:
        block.self_attn.k_proj = Adapted(block.self_attn.k_proj)
    save(model, draw(80), tmp_path / "text.farkv")
    model.model.layers[2].self_attn.k_proj.active = "b"
    refuse_session(model, tmp_path / "text.farkv", "the active adapter")
    model.model.layers[2].self_attn.k_proj.active = "a"
    with attach(model, Full()), torch.no_grad():
        farkv.load_cache(tmp_path / "text.farkv", model)
        model.model.layers[0].self_attn.k_proj.base.weight += 0.5
        with pytest.raises(SessionError, match="trained weights"):
            farkv.load_cache(tmp_path / "text.farkv", model)


def test_positions_of_an_image_are_in_no_session(tmp_path: Path) -> None:
    model, ids = make_model("llama"), draw(24)
    with attach(model, Full()) as far, torch.no_grad():
        cache = far.new_cache()
        places = torch.arange(24).expand(3, 1, -1).clone()
        places[1] += 5
        far._begin(model.model, (), {"input_ids": ids, "past_key_values": cache, "position_ids": places})
        far._end(model.model, (), {"past_key_values": cache}, None)
        forward(model, ids, cache)
        with pytest.raises(CacheStateError, match="has an image"):
            cache.save(tmp_path / "text.farkv")


# --- the life of a cache and of a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_a_prompt_read_in_inference_mode_is_gone_on_from_outside_of_it(family: str) -> None:
    model, ids = make_model(family), draw(24)
    more = {"input_ids": torch.cat([ids, ids[:, :3]], 1), "attention_mask": torch.ones(1, 27, dtype=torch.long)}

    def run(cache: Any) -> Any:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache)
        return generate(model, more, cache).logits

    plain = run(plain_cache(model))
    with attach(model, Full()) as far:
        assert all(torch.equal(a, b) for a, b in zip(run(far.new_cache()), plain, strict=True))
    with attach(model, InfiniGen(fraction=0.3)) as far:
        run(far.new_cache())


def test_gradients_are_refused_and_losses_without_them_are_not() -> None:
    model, ids = build("LlamaConfig"), draw(24)
    with attach(model, Full()) as far, torch.enable_grad():
        cache = far.new_cache()
        forward(model, ids, cache)
        loss = forward(model, ids[:, :3], cache).logsumexp(-1).sum()
        with pytest.raises(CacheStateError, match="gradients"):
            loss.backward()


def test_a_cache_is_of_one_attach_and_of_attached_models() -> None:
    model, other, ids = make_model("llama"), build("LlamaConfig"), draw(24)
    with attach(model, Full()) as far:
        cache = far.new_cache()
        forward(model, ids, cache)
        with attach(other, Full()), pytest.raises(CacheStateError, match="another attach made"):
            forward(other, ids[:, :1], cache)
    with pytest.raises(CacheStateError, match="not; use it inside"):
        forward(model, ids[:, :1], cache)
    with attach(model, Full()), pytest.raises(CacheStateError, match="another attach made"):
        forward(model, ids[:, :1], cache)


def test_attention_that_was_switched_meanwhile_is_refused() -> None:
    model = build("LlamaConfig")
    with attach(model, Full()) as far:
        model.set_attn_implementation("sdpa")
        with pytest.raises(CacheStateError, match="got 'sdpa'"):
            forward(model, draw(24), far.new_cache())


def test_an_attached_model_is_not_copied_and_a_cache_not_pickled_but_copied() -> None:
    model, ids = make_model("llama"), draw(40)
    with attach(model, InfiniGen(fraction=0.3)) as far, torch.no_grad():
        with pytest.raises(CacheStateError, match="detach it first"):
            copy.deepcopy(model)
        cache = far.new_cache()
        forward(model, ids, cache)
        with pytest.raises(CacheStateError, match=r"cache\.save"):
            pickle.dumps(cache)
        twin = copy.deepcopy(cache)
        assert torch.equal(forward(model, ids[:, :1], cache), forward(model, ids[:, :1], twin))
    assert "generate" not in vars(model)


def test_a_generate_of_the_users_own_is_given_back() -> None:
    model: Any = build("LlamaConfig")
    own = model.generate = lambda *args, **kwargs: "mine"
    with attach(model, Full()):
        assert model.generate() == "mine"
    assert model.generate is own


def test_a_cache_has_no_tensors_to_walk_over() -> None:
    model = make_model("llama")
    with attach(model, Full()) as far:
        cache = far.new_cache()
        forward(model, draw(24), cache)
        with pytest.raises(CacheStateError, match="walk over"):
            list(cache)
        with pytest.raises(CacheStateError, match="no tensors"):
            _ = cache.layers[0].keys


def test_a_model_without_a_head_cannot_be_verified() -> None:
    base, ids = build("LlamaConfig").model, draw(24)
    with attach(base, Full()) as far, torch.no_grad():
        cache = far.new_cache(verify=1)
        base(input_ids=ids, past_key_values=cache)
        with pytest.raises(ConfigError, match="no head"):
            base(input_ids=ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 24


@pytest.mark.parametrize(
    "method", [InfiniGen(fraction=0.3), Pages(fraction=0.3), LowBit(fraction=0.3), H2O(fraction=0.3)]
)
def test_another_default_dtype_changes_nothing(method: Any) -> None:
    model, prompt, found = build("LlamaConfig").to(torch.bfloat16), make_prompt(tokens=120), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with attach(model, method, profile=False) as far:
                found.append(generate(model, prompt, far.new_cache()).sequences)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_one_cache_is_not_for_other_prompts() -> None:
    model, first = make_model("llama"), make_prompt(tokens=30)
    with attach(model, Full()) as far:
        cache = far.new_cache()
        made = generate(model, first, cache).sequences
        with pytest.raises(CacheStateError, match="goes on from them"):
            generate(model, make_prompt(tokens=60, seed=2), cache)
        with pytest.raises(CacheStateError, match="goes on from them"):
            generate(model, make_prompt(tokens=20, seed=2), cache)
        more = {"input_ids": made, "attention_mask": torch.ones_like(made)}
        plain = generate(model, more, plain_cache(model))
        assert torch.equal(generate(model, more, cache).sequences, plain.sequences)


# --- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_rounded_records_are_verified_against_what_the_model_made(quant: str) -> None:
    model, ids = make_model("llama"), draw(80)

    @torch.no_grad()
    def run(cache: Any) -> Tensor:
        forward(model, ids[:, :-8], cache)
        return torch.cat([forward(model, token, cache)[:, -1] for token in ids[:, -8:].split(1, 1)]).log_softmax(-1)

    plain = run(DynamicCache(config=model.config))
    with attach(model, Full(), quant=quant) as far:
        cache = far.new_cache(verify=8)
        found = run(cache)
        quality = far.receipt(cache).quality
    kl = float((plain.exp() * (plain - found)).sum(-1).mean())
    assert kl > 0
    assert quality.kl_mean == pytest.approx(kl, rel=0.02)


def test_a_session_of_rounded_records_has_nothing_to_be_verified_against() -> None:
    model, ids = make_model("llama"), draw(80)
    with tempfile.TemporaryDirectory() as folder, attach(model, Full(), quant="int8") as far, torch.no_grad():
        cache = far.new_cache()
        forward(model, ids, cache)
        cache.save(f"{folder}/text.farkv")
        with pytest.raises(ConfigError, match="nothing to compare with"):
            farkv.load_cache(f"{folder}/text.farkv", model, verify=1)


@pytest.mark.parametrize(
    ("method", "words"), [("infinigen", "got 'infinigen'"), (InfiniGen, "got the class InfiniGen"), (0.1, "got float")]
)
def test_what_is_no_method_is_refused_with_what_is(method: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        attach(make_model("llama"), method)
    assert "attach(model, farkv.InfiniGen(fraction=0.05))" in str(refused.value)


@pytest.mark.parametrize("model", ["a/folder", None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="expected a model of transformers"):
        attach(model)


def test_a_receipt_prints_as_its_table_and_shows_its_layers_in_a_notebook() -> None:
    model = make_model("gemma3")
    with attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache()
        generate(model, make_prompt(tokens=120), cache)
        receipt = far.receipt(cache)
    lines = str(receipt).splitlines()
    assert lines[0] == "receipt: infinigen, Gemma3ForCausalLM"
    assert all(len(line) <= 80 for line in lines if line.startswith(("context", "read", "near", "host", "decode")))
    assert any(line.split()[:3] == ["read", "per", "step"] for line in lines)
    assert "not managed: layer 0" in str(receipt)
    page = receipt._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") >= 10
    assert page.count("<span") == 4


def test_the_package_lists_what_there_is_to_use() -> None:
    assert {"attach", "InfiniGen", "load_cache", "methods"} <= set(dir(farkv))
    assert not {"annotations", "TYPE_CHECKING"} & set(dir(farkv))


def test_codes_of_quantised_weights_are_told_apart_to_the_last_bit() -> None:
    # In bfloat16 both are 256.
    codes = [torch.full((4,), n, dtype=torch.int32) for n in (256, 257)]
    assert digest_tensors(codes[:1]) != digest_tensors(codes[1:])
    assert digest_tensors(codes[:1]) == digest_tensors([codes[0].clone()])


def test_a_cache_of_a_model_that_was_changed_meanwhile_is_refused() -> None:
    model, prompt = copy.deepcopy(make_model("llama")), make_prompt(tokens=40)
    with attach(model, Full()) as far:
        cache = far.new_cache()
        forward(model, prompt["input_ids"][:, :30], cache)
        generate(model, prompt, cache, n=2)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        longer = {name: torch.cat([part, part[:, :20]], 1) for name, part in prompt.items()}
        with pytest.raises(CacheStateError, match="before the model was changed, which is another in its weights"):
            generate(model, longer, cache, n=2)
        generate(model, prompt, far.new_cache(), n=2)


def test_a_cache_of_ours_without_a_cache_is_refused() -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=40)
    with attach(model, Full()) as far, pytest.raises(ConfigError, match="use_cache=False"):
        generate(model, prompt, far.new_cache(), n=3, use_cache=False)
