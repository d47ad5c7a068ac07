"""H2O: what stays is what got most attention, from all queries, and the newest half."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import farkv
from farkv.errors import CapacityError, ConfigError
from farkv.hf.ask import Listener, prefill
from farkv.methods import H2O, XKV, InfiniGen
from tests.methods.evictors import Hitters, attend_plainly, count, count_recent, keep_best, places
from tests.models import assert_same, forward, generate, make_model, make_prompt, plain_cache

TOKENS = 60
SINGLE = make_prompt(1, tokens=TOKENS)
BATCH = make_prompt(2, tokens=TOKENS)
PADDED = make_prompt(3, tokens=TOKENS, pad=20)
IDS = BATCH["input_ids"]


def steps(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    return [forward(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]


def sums_of(cache: Any, layer: int) -> Tensor:
    return cache.engine.store.kept[layer].scores.view()[..., 0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt_oss", "qwen3_next"])
def test_a_whole_budget_equals_the_plain_model(family: str) -> None:
    model = make_model(family)
    for prompt, near in ((make_prompt(3, pad=9), None), (make_prompt(1, tokens=30), "1MiB")):
        plain = generate(model, prompt)
        with farkv.attach(model, H2O(fraction=1.0), near=near) as far:
            assert_same(generate(model, prompt, far.new_cache()), plain)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma2"])
@pytest.mark.parametrize("prompt", [BATCH, PADDED], ids=["batch", "padded"])
def test_the_prompt_leaves_its_heavy_hitters_and_its_newest(family: str, prompt: Any) -> None:
    model = make_model(family)
    weights = attend_plainly(model, prompt)
    real = prompt["attention_mask"].bool()
    with farkv.attach(model, H2O(fraction=0.3)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
        managed = far.managed
    store, n_recent = cache.engine.store, count_recent(0.3, TOKENS)
    for i in managed:
        held, sums = places(store, i), weights[i].sum(2)
        assert count(0.3, TOKENS) - 1 <= held.shape[2] <= count(0.3, TOKENS)
        assert torch.allclose(sums_of(cache, i).double(), sums.gather(2, held), rtol=1e-4, atol=1e-6)
        for b in range(len(real)):
            for h in range(held.shape[1]):
                best = keep_best(sums[b, h], real[b], held.shape[2], n_recent)
                assert held[b, h].tolist() == best.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_decoding_evicts_step_by_step_as_plain_code_does(fraction: float) -> None:
    model = make_model("llama")
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("evict_for_tests")
    Hitters.start(fraction)
    theirs = plain_cache(twin)
    with farkv.attach(model, H2O(fraction=fraction)) as far:
        ours = far.new_cache()
        for part in (IDS, *make_prompt(2, tokens=10, seed=4)["input_ids"].split(1, 1)):
            logits, expected = forward(model, part, ours), forward(twin, part, theirs)
            assert torch.allclose(logits.double(), expected, atol=1e-3)
            for i in range(4):
                alive = Hitters.alive[i]
                held = alive.nonzero()[:, 2].view(*alive.shape[:2], -1)
                assert torch.equal(places(ours.engine.store, i), held)
        assert far.receipt().kept_fraction <= fraction
    assert any(n < TOKENS for n in (ours.engine.store.length(i) for i in range(4)))


@pytest.mark.parametrize("chunk", [7, 30, 59])
def test_chunks_give_the_sums_of_one_pass(chunk: int) -> None:
    # 200 tokens: several blocks of queries, and sums that are added while the prompt is read.
    model, tokens = make_model("llama"), make_prompt(1, tokens=201)["input_ids"][0].tolist()
    caches = []
    with farkv.attach(model, H2O(fraction=0.3)) as far:
        for n in (None, chunk):
            caches.append(far.new_cache())
            prefill(far, caches[-1], tokens, n, Listener())
    for i in range(4):
        assert torch.equal(*(places(cache.engine.store, i) for cache in caches))
        assert torch.allclose(*(sums_of(cache, i) for cache in caches), rtol=1e-4, atol=1e-6)


def test_a_padded_sequence_scores_as_it_does_alone() -> None:
    model, n_pads = make_model("llama"), int((PADDED["attention_mask"][0] == 0).sum())
    assert n_pads
    alone = {name: rows[:1, n_pads:] for name, rows in PADDED.items()}
    with farkv.attach(model, H2O(fraction=0.999)) as far:
        padded, single = far.new_cache(), far.new_cache()
        model(**PADDED, past_key_values=padded)
        model(**alone, past_key_values=single)
    for i in range(4):
        mine = dict(zip(places(padded.engine.store, i)[0, 0].tolist(), sums_of(padded, i)[0, 0].tolist(), strict=True))
        same = dict(zip(places(single.engine.store, i)[0, 0].tolist(), sums_of(single, i)[0, 0].tolist(), strict=True))
        assert all(mine[n] == 0.0 for n in mine if n < n_pads), "padding gets nothing"
        assert all(abs(mine[n + n_pads] - value) < 1e-3 for n, value in same.items())


@pytest.mark.parametrize("n_new", [60, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_the_cap_holds_at_every_step(fraction: float, n_new: int) -> None:
    model, ids = make_model("llama", num_hidden_layers=2), make_prompt(1, tokens=100 + n_new)["input_ids"]
    with farkv.attach(model, H2O(fraction=fraction)) as far:
        cache = far.new_cache()
        forward(model, ids[:, :100], cache)
        for t in range(100, 100 + n_new):
            forward(model, ids[:, t : t + 1], cache)
            assert sum(cache.engine.store.length(i) for i in (0, 1)) <= 2 * fraction * (t + 1)
        receipt = far.receipt()
    assert receipt.method == "h2o"
    assert receipt.read_fraction <= fraction
    assert 0.8 * fraction <= receipt.kept_fraction <= fraction
    assert receipt.evicted_records == 2 * sum(cache.engine.store.evicted.values())


def test_what_was_taken_back_scores_nothing() -> None:
    model, ids = make_model("llama"), make_prompt(1, tokens=100)["input_ids"]
    with farkv.attach(model, H2O(fraction=0.9)) as far:
        kept = []
        for detour in (False, True):
            cache = far.new_cache()
            forward(model, ids[:, :60], cache)
            if detour:
                steps(model, cache, ids[:, 90:93])
                cache.crop(-3)
            steps(model, cache, ids[:, 60:75])
            kept.append([(places(cache.engine.store, i), sums_of(cache, i)) for i in range(4)])
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_sums_go_with_their_sequences() -> None:
    model, order = make_model("llama"), torch.tensor([1, 0, 0])
    with farkv.attach(model, H2O(fraction=0.4)) as far:
        cache, fresh = far.new_cache(), far.new_cache()
        forward(model, IDS, cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        forward(model, IDS[order], fresh)
        twin = copy.deepcopy(cache)
        for one in (cache, twin, fresh):
            steps(model, one, IDS[order, :20])
    for i in range(4):
        assert torch.equal(places(cache.engine.store, i), places(fresh.engine.store, i))
        assert torch.equal(sums_of(cache, i), sums_of(twin, i))


def test_a_pass_that_fails_adds_nothing() -> None:
    model, tokens = make_model("llama"), make_prompt(1, tokens=190)["input_ids"]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with farkv.attach(model, H2O(fraction=0.3)) as far:
        cache, fresh = far.new_cache(), far.new_cache()
        for each in (cache, fresh):
            each.engine.announce_prompt(190, 95)
            forward(model, tokens[:, :95], each)
        hook = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            forward(model, tokens[:, 95:], cache)
        hook.remove()
        for each in (cache, fresh):
            forward(model, tokens[:, 95:], each)
    for i in range(4):
        assert torch.equal(sums_of(cache, i), sums_of(fresh, i))


def test_what_it_cannot_go_with_is_refused(tmp_path: Any) -> None:
    model = make_model("llama")
    for options in ({"disk": f"{tmp_path}:1MiB"}, {"quant": "int8"}):
        with pytest.raises(ConfigError, match="H2O reads whole layers in place"):
            farkv.attach(model, H2O(), **options)
    with pytest.raises(ConfigError, match="H2O evicts by its own scores"):
        farkv.attach(model, H2O(), host="1MiB", evict="lru")
    with pytest.raises(ConfigError, match="H2O: evicts by a rule of its own"):
        farkv.attach(model, H2O(), XKV())
    with pytest.raises(ConfigError, match="expected one method"):
        farkv.attach(model, H2O(), InfiniGen())
    with farkv.attach(model, H2O(), near="4KiB") as far, pytest.raises(CapacityError):
        forward(model, IDS, far.new_cache())
    assert model.config._attn_implementation == "sdpa"
