"""SnapKV and PyramidKV: the last queries say what stays; equal shares, or shares that fall with depth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool1d

import farkv
from farkv.errors import ConfigError
from farkv.hf.ask import Listener, prefill
from farkv.methods import Method, PyramidKV, SnapKV
from tests.methods.evictors import attend_plainly, count, places
from tests.models import assert_same, forward, generate, make_model, make_prompt

TOKENS = 60
BATCH = make_prompt(2, tokens=TOKENS)
PADDED = make_prompt(3, tokens=TOKENS, pad=20)
KINDS = {"snapkv": SnapKV, "pyramidkv": PyramidKV}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# A stored score is a bfloat16: those of two records that change places are within two of its steps.
CLOSE = 2.0**-6


@every_kind
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_whole_budget_equals_the_plain_model(family: str, kind: Any) -> None:
    model, prompt = make_model(family), make_prompt(3, pad=9)
    plain = generate(model, prompt)
    with farkv.attach(model, kind(fraction=1.0)) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)


@every_kind
@pytest.mark.parametrize("window", [4, 32])
@pytest.mark.parametrize("prompt", [BATCH, PADDED], ids=["batch", "padded"])
def test_the_last_queries_say_what_stays(prompt: Any, window: int, kind: Any) -> None:
    model = make_model("llama")
    weights = attend_plainly(model, prompt)
    with farkv.attach(model, kind(fraction=0.4, window=window)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    # The window takes at most half of the cap.
    n_recent = min(window, count(0.4, TOKENS) // 2)
    n_old = TOKENS - n_recent
    for i in range(4):
        held = places(cache.engine.store, i)
        assert (held[..., -n_recent:] == torch.arange(n_old, TOKENS)).all()
        scores = avg_pool1d(weights[i][:, :, n_old:, :n_old].sum(2), 7, 1, 3)
        scores.masked_fill_(~prompt["attention_mask"].bool()[:, None, :n_old], -1)
        for row, score in zip(held.flatten(0, 1), scores.flatten(0, 1), strict=True):
            old = row[:-n_recent]
            left = torch.ones(n_old, dtype=torch.bool)
            left[old] = False
            # The last layer's share of a pyramid may be less than one record.
            least = score[old].min() if len(old) else score.max()
            assert score[left].max() <= least + CLOSE * least.abs(), "a better record was dropped"


@every_kind
@pytest.mark.parametrize("n_new", [50, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
def test_the_cap_holds_at_every_step(fraction: float, n_new: int, kind: Any) -> None:
    model, ids = make_model("llama"), make_prompt(1, tokens=100 + n_new)["input_ids"]
    with farkv.attach(model, kind(fraction=fraction)) as far:
        cache = far.new_cache()
        forward(model, ids[:, :100], cache)
        for t in range(100, 100 + n_new):
            forward(model, ids[:, t : t + 1], cache)
            assert sum(cache.engine.store.length(i) for i in range(4)) <= 4 * fraction * (t + 1)
        receipt = far.receipt()
    assert receipt.method == kind.__name__.lower()
    assert receipt.read_fraction <= fraction
    assert 0.8 * fraction <= receipt.kept_fraction <= fraction


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_pyramid_shares_fall_with_depth_and_sum_to_the_budget(fraction: float) -> None:
    model, ids = make_model("llama"), make_prompt(1, tokens=200)["input_ids"]
    held = {}
    for kind in (SnapKV, PyramidKV):
        with farkv.attach(model, kind(fraction=fraction, window=4)) as far:
            cache = far.new_cache()
            forward(model, ids, cache)
            held[kind] = [cache.engine.store.length(i) for i in range(4)]
    pyramid, equal = held[PyramidKV], held[SnapKV]
    assert len(set(equal)) == 1
    assert all(a > b for a, b in itertools.pairwise(pyramid))
    # Linear: equal differences, to rounding; and the same sum, but for the room of each layer's next record.
    falls = [a - b for a, b in itertools.pairwise(pyramid)]
    assert max(falls) - min(falls) <= 3
    assert abs(sum(pyramid) - sum(equal)) <= 4
    assert sum(pyramid) <= 4 * count(fraction, 200)


@every_kind
@pytest.mark.parametrize("chunk", [7, 40])
def test_a_prompt_in_chunks_keeps_what_one_pass_keeps(chunk: int, kind: Any) -> None:
    model, tokens = make_model("llama"), make_prompt(1, tokens=101)["input_ids"][0].tolist()
    held = []
    with farkv.attach(model, kind(fraction=0.4)) as far:
        for n in (None, chunk):
            cache = far.new_cache()
            prefill(far, cache, tokens, n, Listener())
            held.append([places(cache.engine.store, i) for i in range(4)])
    for one, many in zip(*held, strict=True):
        assert one.shape == many.shape
        # Two scores may tie in bfloat16.
        assert (one[..., None] != many[..., None, :]).all(-1).sum(-1).max() <= 1


@pytest.mark.parametrize("method", [SnapKV(), PyramidKV()], ids=KINDS)
def test_what_they_cannot_go_with_is_refused(method: Method) -> None:
    model = make_model("llama")
    with pytest.raises(ConfigError, match=f"{type(method).__name__} reads whole layers in place"):
        farkv.attach(model, method, quant="int8")
