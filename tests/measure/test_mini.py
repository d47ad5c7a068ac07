"""The mini-inference: it sees what the plain model computes, stores nothing, stops early, and leaves no trace.

The reference shares no line with farkv: keys from Hugging Face's own DynamicCache, queries from a recording attention
function, curves written out in numpy at float64.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import farkv
from farkv.calibrate.curves import GRID
from farkv.errors import ConfigError, ProfileError
from farkv.measure import profile as measure
from farkv.measure.mini import RUN, Light, Look, draw_runs, run_mini, thin_blocks
from farkv.methods import Full
from tests.models import FAMILIES, assert_same, generate, make_model, make_prompt, plain_cache

PROMPTS = [make_prompt(1, tokens=n, seed=n)["input_ids"][0] for n in (45, 9, 300)]
MANAGED = [f for f in FAMILIES if f != "mistral_sliding"]
WHOLE = ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "opt", "gpt_neox", "granite"]
LOOK = Look("window", 8, 7, curves=True, grams=False)


class Seen:
    """What the recording attention saw, by layer: queries, scaling, softcap."""

    calls: dict[int, tuple[Tensor, float, float | None]]


def run_recorded(model: Any, ids: Tensor) -> tuple[dict[int, tuple[Tensor, float, float | None]], Any]:
    """Prefill the plain model; return the queries of every layer and its cache."""
    name, Seen.calls = model.config._attn_implementation, {}

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        softcap = kwargs.get("softcap") if name == "eager" else None
        Seen.calls[module.layer_idx] = (q.clone(), kwargs.get("scaling") or q.shape[-1] ** -0.5, softcap)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return (eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name])(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("record_for_tests", record)
    AttentionMaskInterface.register("record_for_tests", ALL_MASK_ATTENTION_FUNCTIONS[name])
    cache = plain_cache(model)
    model.set_attn_implementation("record_for_tests")
    try:
        model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    finally:
        model.set_attn_implementation(name)
    return Seen.calls, cache


def cut(gains: np.ndarray) -> np.ndarray:
    """Return the cumulative curve at every point of the grid."""
    n = len(gains)
    total = np.concatenate([[0.0], np.cumsum(gains / gains.sum())])
    return np.interp(np.arange(1, GRID + 1) / GRID, np.arange(n + 1) / n, total)


def make_reference(model: Any, ids: Tensor, layers: list[int], window: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both cumulative curves of every layer, by the book."""
    calls, cache = run_recorded(model, ids)
    keep, spread = [], []
    for i in layers:
        q, scaling, softcap = calls[i]
        queries = q[0, :, -window:].double().numpy()
        keys = cache.layers[i].keys[0].double().numpy()
        n, group = keys.shape[1], q.shape[1] // keys.shape[0]
        logits = scaling * queries @ np.repeat(keys, group, 0).swapaxes(1, 2)
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        for row in range(window):
            logits[:, row, n - window + row + 1 :] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        weights = weights.reshape(-1, group, window, n).mean(1)
        scores = weights.sum(1)[:, : n - window]
        pooled = np.stack([np.convolve(row, np.ones(pool) / pool, "same") for row in scores])
        if pooled.shape[1] != n - window:  # numpy returns the longer of both
            pooled = np.stack([np.convolve(row, np.ones(pool) / pool)[pool // 2 :][: n - window] for row in scores])
        keep.append(cut(-np.sort(-pooled, -1).sum(0)))
        spread.append(cut((-np.sort(-weights, -1)).mean((0, 1))))
    return np.stack(keep), np.stack(spread)


def describe(model: Any) -> Any:
    """Return all that profiling could change of a model."""
    modules = [(name, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return modules, model.config._attn_implementation, [sorted(vars(m)) for m in model.modules()]


@pytest.mark.parametrize("family", MANAGED)
def test_curves_are_those_of_a_plain_run(family: str) -> None:
    model = make_model(family)
    before = describe(model)
    curves = farkv.profile(model, PROMPTS, window=5, pool=3).curves()
    assert describe(model) == before
    assert curves.tokens.tolist() == [45, 9, 300]
    for i, ids in enumerate(PROMPTS):
        keep, spread = make_reference(model, ids, list(curves.layers), window=5, pool=3)
        assert np.abs(curves.keep[i].double().cumsum(-1).numpy() - keep).max() < 2e-5
        assert np.abs(curves.spread[i].double().cumsum(-1).numpy() - spread).max() < 2e-5


def test_eager_with_a_softcap() -> None:
    model = make_model("gemma2", implementation="eager")
    curves = farkv.profile(model, PROMPTS[:1]).curves()
    keep, spread = make_reference(model, PROMPTS[0], list(curves.layers), window=8, pool=7)
    assert np.abs(curves.keep[0].double().cumsum(-1).numpy() - keep).max() < 2e-5
    assert np.abs(curves.spread[0].double().cumsum(-1).numpy() - spread).max() < 2e-5


@pytest.mark.parametrize("scorer", ["expected", "value"])
def test_every_scorer(scorer: Any) -> None:
    curves = farkv.profile(make_model("llama"), PROMPTS, scorer=scorer).curves()
    assert torch.allclose(curves.keep.sum(-1), torch.ones(3, 4), atol=1e-5)
    window = farkv.profile(make_model("llama"), PROMPTS).curves()
    assert not torch.allclose(curves.keep, window.keep, atol=1e-5)
    assert torch.equal(curves.spread, window.spread)


def count_calls(model: Any) -> tuple[Counter[str], list[Any]]:
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]
    return calls, hooks


@pytest.mark.parametrize("light", [None, Light(1.0, 2), Light(1.0, 3)])
def test_what_nobody_needs_never_runs(light: Light | None) -> None:
    model = make_model("llama")
    calls, hooks = count_calls(model)
    farkv.profile(model, PROMPTS, light=light)
    for hook in hooks:
        hook.remove()
    run = {None: [0, 1, 2, 3], 2: [0, 2, 3], 3: [0, 3]}[light and light.layers]
    for i in range(4):
        block = f"model.layers.{i}"
        assert calls[f"{block}.self_attn.q_proj"] == (3 if i in run else 0)
        assert calls[f"{block}.mlp"] == calls[f"{block}.self_attn.o_proj"] == (3 if i in run[:-1] else 0)
    assert calls["model.norm"] == calls["lm_head"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_managed_layers_store_nothing(family: str) -> None:
    model = make_model(family)
    with farkv.attach(model, Full()) as handle:
        sample = run_mini(handle, PROMPTS[2], LOOK, handle.managed)
        cache: Any = handle._last
        assert sorted(sample.keep) == handle.managed
        assert {t.shape for t in (*sample.keep.values(), *sample.spread.values())} == {(GRID,)}
        for i in handle.managed:
            assert cache.engine.store.length(i) == 0
            assert not [name for name, value in vars(cache.layers[i]).items() if isinstance(value, Tensor)]
            assert cache.layers[i].get_seq_length() == 300


@pytest.mark.parametrize("light", [None, Light(0.25, 2)])
def test_an_error_inside_leaves_the_model_as_it_was(light: Light | None) -> None:
    model = make_model("llama")
    plain, before = generate(model, make_prompt(1)), describe(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    hook = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"):
        farkv.profile(model, PROMPTS, light=light)
    hook.remove()
    assert describe(model) == before
    with pytest.raises(RuntimeError, match="a fault"):
        farkv.profile(model, PROMPTS, light=light, on_prompt=fail)
    assert describe(model) == before
    assert_same(generate(model, make_prompt(1)), plain)


# --- light ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WHOLE)
def test_light_runs_on_every_family_that_is_all_full_attention(family: str) -> None:
    model = make_model(family)
    plain, before = generate(model, make_prompt(1)), describe(model)
    curves = farkv.profile(model, PROMPTS, light=Light(0.5, 2)).curves()
    assert curves.layers == (0, 1, 2, 3)
    assert curves.settings["light"] == {"tokens": 0.5, "layers": 2}
    assert curves.tokens.tolist() == [45, 9, 300]
    for rows in (curves.keep, curves.spread):
        assert torch.allclose(rows.sum(-1), torch.ones(3, 4), atol=1e-5)
        assert bool((rows.diff(dim=-1) <= 1e-9).all())
        assert torch.allclose(rows[:, 1], (rows[:, 0] + rows[:, 2]) / 2, atol=1e-7)
    assert describe(model) == before
    assert_same(generate(model, make_prompt(1)), plain)


def test_light_over_everything_is_the_full_pass() -> None:
    model = make_model("llama")
    full, light = (farkv.profile(model, PROMPTS, light=x).curves() for x in (None, Light(1.0, 1)))
    assert torch.equal(full.keep, light.keep)
    assert torch.equal(full.spread, light.spread)


@pytest.mark.parametrize("family", [f for f in MANAGED if f not in WHOLE])
def test_light_refuses_models_with_other_layers(family: str) -> None:
    model = make_model(family)
    with pytest.raises(ConfigError, match="expected full attention in all layers"):
        farkv.profile(model, PROMPTS, light=Light(0.25, 2))
    curves = farkv.profile(model, PROMPTS[2:], light=Light(0.5, 1)).curves()
    assert torch.allclose(curves.keep.sum(-1), torch.ones(1, len(curves.layers)), atol=1e-5)


def test_light_runs_a_share_of_the_tokens_and_always_the_last() -> None:
    model, runs = make_model("llama"), []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda m, args: runs.append(args[0][0].clone()))
    ids = make_prompt(1, tokens=5 * RUN, seed=3)["input_ids"][0]
    farkv.profile(model, [ids] * 2, light=Light(0.4, 1))
    hook.remove()
    assert [len(run) for run in runs] == [2 * RUN, 2 * RUN]
    assert all(torch.equal(run[-RUN:], ids[-RUN:]) for run in runs)


@pytest.mark.parametrize("n", [1, 9, 64, 65, 640, 4001])
@pytest.mark.parametrize("share", [1e-6, 0.25, 0.5, 1.0])
def test_runs_are_spread_over_the_prompt(n: int, share: float) -> None:
    for seed in range(5):
        positions = draw_runs(n, share, seed)
        assert bool((positions.diff() > 0).all())
        assert positions[0] >= 0
        assert positions[-1] == n - 1
        assert torch.equal(positions[-RUN:], torch.arange(max(n - RUN, 0), n)[-len(positions) :])
        assert abs(len(positions) - share * n) <= RUN
        assert torch.equal(positions, draw_runs(n, share, seed))
        # Runs from equal stretches: no gap is wider than two of them.
        gaps = torch.cat((positions.new_tensor([-1]), positions)).diff().max()
        assert gaps <= 2 * n / max(round(share * -(-n // RUN)) - 1, 0.5) + RUN
    if n == 4001 and share < 1 and share > 0.1:
        assert len({tuple(draw_runs(n, share, s).tolist()) for s in range(5)}) > 1


def test_blocks_are_restored_after_an_error() -> None:
    model = make_model("llama")
    blocks = model.model.layers
    with farkv.attach(model, Full()) as handle:
        with pytest.raises(RuntimeError), thin_blocks(handle, 2) as left:
            assert left == [0, 2, 3]
            assert len(model.model.layers) == 3
            raise RuntimeError
        assert model.model.layers is blocks


# --- interrupted and resumed ------------------------------------------------------------------------------------


def assert_equal(a: farkv.Profile, b: farkv.Profile) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    x, y = a.curves(), b.curves()
    assert torch.equal(x.keep, y.keep)
    assert torch.equal(x.spread, y.spread)
    assert torch.equal(x.tokens, y.tokens)


def interrupt_at(n: int) -> Any:
    def tell(done: int, total: int) -> None:
        if done == n:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("light", [None, Light(0.5, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_resumed_is_uninterrupted_bit_for_bit(family: str, light: Light | None, tmp_path: Path) -> None:
    model, part = make_model(family), tmp_path / "p.part"
    prompts = [*PROMPTS, PROMPTS[0][:6]]
    whole = farkv.profile(model, prompts, light=light)
    for n in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            farkv.profile(model, prompts, light=light, resume=part, on_prompt=interrupt_at(n))
        assert [p.name for p in tmp_path.iterdir()] == ["p.part"]
    told: list[tuple[int, int]] = []
    resumed = farkv.profile(
        model, prompts, light=light, resume=part, on_prompt=lambda done, total: told.append((done, total))
    )
    assert told == [(3, 4), (4, 4)]
    assert_equal(resumed, whole)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_inside_a_prompt_loses_that_prompt_alone(tmp_path: Path) -> None:
    model, part, runs = make_model("llama"), tmp_path / "p.part", []
    whole = farkv.profile(model, PROMPTS)

    def fail(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        farkv.profile(model, PROMPTS, resume=part)
    assert_equal(farkv.profile(model, PROMPTS, resume=part), whole)
    hook.remove()
    assert len(runs) == 4


def test_a_kill_leaves_the_last_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS_BETWEEN_WRITES", 0.0)
    model, part, left = make_model("llama"), tmp_path / "p.part", tmp_path / "left"
    whole = farkv.profile(model, PROMPTS)

    def copy_part(done: int, total: int) -> None:
        if done == 2:
            left.write_bytes(part.read_bytes())

    farkv.profile(model, PROMPTS, resume=part, on_prompt=copy_part)
    assert not part.exists()
    assert_equal(farkv.profile(model, PROMPTS, resume=left), whole)


def test_no_file_before_the_first_prompt(tmp_path: Path) -> None:
    model = make_model("llama")
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        farkv.profile(model, PROMPTS, resume=tmp_path / "p.part")
    hook.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("planted", ["a link", "a second name", "open to others", "a pipe"])
def test_a_part_that_others_can_have_written_is_refused(tmp_path: Path, planted: str) -> None:
    model, part, left = make_model("llama"), tmp_path / "p.part", tmp_path / "left"
    with pytest.raises(KeyboardInterrupt):
        farkv.profile(model, PROMPTS, resume=left, on_prompt=interrupt_at(1))
    assert left.stat().st_mode & 0o777 == 0o600
    before = left.read_bytes()
    if planted == "a link":
        part.symlink_to(left)
    elif planted == "a second name":
        part.hardlink_to(left)
    elif planted == "a pipe":
        os.mkfifo(part)
    else:
        part.write_bytes(before)
        part.chmod(0o666)
    with pytest.raises(ProfileError, match=r"resume .*p\.part: .*; delete it to start over"):
        farkv.profile(model, PROMPTS, resume=part)
    assert left.read_bytes() == before
    assert os.path.lexists(part)


def test_the_part_of_another_task_is_refused(tmp_path: Path) -> None:
    model, part = make_model("llama"), tmp_path / "p.part"
    with pytest.raises(KeyboardInterrupt):
        farkv.profile(model, PROMPTS, resume=part, on_prompt=interrupt_at(1))
    before = part.read_bytes()
    twin = copy.deepcopy(model)
    twin.get_input_embeddings().weight.data += 0.5
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        (model, PROMPTS[:2], {}),
        (model, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], {}),
        (model, PROMPTS, {"window": 7}),
        (model, PROMPTS, {"scorer": "value"}),
        (model, PROMPTS, {"curves": False}),
        (model, PROMPTS, {"light": Light(0.25, 2)}),
        (twin, PROMPTS, {}),
        (copy.deepcopy(model).to(torch.bfloat16), PROMPTS, {}),
    ]
    for other, prompts, settings in others:
        with pytest.raises(ProfileError, match="delete it"):
            farkv.profile(other, prompts, resume=part, **settings)
    assert part.read_bytes() == before
    for keep in (0, 4, 40, len(before) - 1):
        part.write_bytes(before[:keep])
        with pytest.raises(ProfileError, match="delete it"):
            farkv.profile(model, PROMPTS, resume=part)
    farkv.profile(model, PROMPTS).save(part)
    with pytest.raises(ProfileError, match="delete it"):
        farkv.profile(model, PROMPTS, resume=part)
