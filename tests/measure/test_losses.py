"""Losses of limited layers: against plain models whose attention hides the same records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.calibrate.losses import SHARES, Losses
from farkv.errors import ConfigError, InputError
from farkv.math.logits import Logits
from farkv.math.step import Query, Step
from farkv.measure.losses import STEPS, Limit, LimitedLayer, decode_again, decode_greedily, measure_losses
from farkv.methods import Full
from tests.models import forward, generate, make_model, make_prompt, plain_cache

IDS = make_prompt(1, tokens=100)["input_ids"][0]


def read_prompt(handle: Any) -> Any:
    """Return a cache of limited layers that has read all but the last token."""
    cache = handle.new_cache(tokens=IDS.shape[0] + STEPS)
    for i in handle.managed:
        cache.layers[i] = LimitedLayer(i, cache.engine)
    handle.decoder(input_ids=IDS[None, :-1], past_key_values=cache, use_cache=True)
    for i in handle.managed:
        cache.layers[i].prompt_tokens = IDS.shape[0] - 1
    return cache


def test_without_a_limit_it_is_the_plain_model() -> None:
    model = make_model("llama")
    plain = generate(model, {"input_ids": IDS[None], "attention_mask": torch.ones_like(IDS)[None]}, n=STEPS)
    with farkv.attach(model, Full()) as handle:
        cache = read_prompt(handle)
        tokens, logs = decode_greedily(handle, cache, int(IDS[-1]))
        assert cache.get_seq_length() == IDS.shape[0] - 1
        again = decode_again(handle, cache, tokens)
    assert torch.equal(logs, again)
    assert tokens[1:] == plain.sequences[0, IDS.shape[0] : -1].tolist()
    for mine, theirs in zip(logs, plain.logits, strict=True):
        assert torch.allclose(mine, theirs[0].double().log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("kind", ["keep", "fetch"])
def test_a_limit_hides_all_but_its_share_of_one_layer(kind: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, Full()) as handle:
        cache = read_prompt(handle)
        free = forward(model, IDS[None, -1:], cache)
        cache.crop(-1)
        layer = cache.layers[2]
        layer.limit = Limit(kind, 1.0)
        assert torch.allclose(forward(model, IDS[None, -1:], cache), free, atol=1e-5), "a share of 1 hides nothing"
        n = IDS.shape[0]
        k, v = cache.engine.store.records(2)
        step = Step(Query(torch.randn(1, 4, 1, 8), Logits(8**-0.5)), k[:, :, -1:], v[:, :, -1:], None)
        allowed = (layer.keep if kind == "keep" else layer.fetch)(step, k, v, 0.2)
    assert allowed[..., -1].all(), "the newest is always seen"
    expected = int(0.2 * (n - 1)) + 1 if kind == "keep" else int(0.2 * n)
    assert (allowed.sum(-1) == expected).all()


def test_losses_are_kl_to_the_plain_model_with_those_records_hidden() -> None:
    """One layer, everything hidden but the window and the best: an own dense attention gives the same KL."""
    model = make_model("llama", num_hidden_layers=1)
    with farkv.attach(model, Full()) as handle:
        cache = read_prompt(handle)
        tokens, reference = decode_greedily(handle, cache, int(IDS[-1]))
        layer = cache.layers[0]
        layer.limit = Limit("keep", 0.1)
        logs = decode_again(handle, cache, tokens)
        positions = layer.scores.topk(int(0.1 * (IDS.shape[0] - 1)) - 8, -1).indices
    twin = make_model("llama", num_hidden_layers=1)
    past = plain_cache(twin)
    forward(twin, IDS[None, :-1], past)
    keys, values = past.layers[0].keys, past.layers[0].values
    n = keys.shape[2]
    keep = torch.zeros(1, 2, n, dtype=torch.bool).scatter_(-1, positions, value=True)
    keep[..., -8:] = True
    rows = keep[0].nonzero()[:, 1].view(1, 2, -1, 1).expand(-1, -1, -1, 8)
    past.layers[0].keys, past.layers[0].values = keys.gather(2, rows), values.gather(2, rows)
    kept = past.layers[0].keys.shape[2]
    for i, token in enumerate(tokens):
        out = twin(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[n + i]]), past_key_values=past,
            attention_mask=torch.ones(1, kept + i + 1, dtype=torch.long),
        )  # fmt: skip
        assert torch.allclose(out.logits[0, -1].double().log_softmax(-1), logs[i], atol=1e-4)
    assert not torch.allclose(reference, logs, atol=1e-2), "hiding records must matter, or this proves nothing"


def test_measured_losses_fall_to_little_and_leave_the_model_alone() -> None:
    model = make_model("qwen3", num_hidden_layers=2)
    before = generate(model, make_prompt(1), n=3)
    with farkv.attach(model, Full()) as handle:
        done: list[tuple[int, int]] = []
        losses = measure_losses(handle, [IDS, IDS.flip(0)], lambda a, b: done.append((a, b)))
    assert done == [(1, 2), (2, 2)]
    assert losses.keep.shape == losses.fetch.shape == (2, len(SHARES))
    assert losses.prompts == 2
    assert (losses.keep >= 0).all()
    assert (losses.fetch[:, -1] < losses.fetch[:, 0]).all()
    assert torch.equal(generate(model, make_prompt(1), n=3).sequences, before.sequences)


def test_a_profile_carries_them(tmp_path: Any) -> None:
    model = make_model("llama", num_hidden_layers=2)
    measured = farkv.profile(model, [IDS, IDS.flip(0)], losses=1)
    measured.save(tmp_path / "p.safetensors")
    loaded = farkv.Profile.load(tmp_path / "p.safetensors")
    assert isinstance(loaded.losses(), Losses)
    assert torch.equal(loaded.losses().keep, measured.losses().keep)
    assert loaded.losses().shares == SHARES
    assert torch.equal(loaded.curves().tokens, torch.tensor([100, 100]))
    assert loaded.curves().settings["token_bytes"] == [2 * 2 * 8 * 4] * 2
    with pytest.raises(farkv.FarKVError, match="--losses"):
        farkv.profile(model, [IDS]).losses()
    with pytest.raises(InputError, match="64"):
        farkv.profile(model, [IDS[:40]], losses=1)
    with pytest.raises(ConfigError, match="losses"):
        farkv.profile(model, [IDS], losses=-1)
