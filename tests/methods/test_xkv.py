"""XKV: what it keeps of a prompt is what its scores and its shares say, computed a second time in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import farkv
from farkv.math.allocate import allocate, measure_retention
from farkv.methods import XKV
from tests.engine.kept import IDS, PADDED, SINGLE, TOKENS, make_shares
from tests.hf.test_exact import BEAM
from tests.methods.evictors import assert_best_are_kept, curve_plainly, places, score_plainly
from tests.models import FAMILIES, assert_same, forward, generate, make_model, make_prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_budget_equals_the_plain_model(family: str) -> None:
    model = make_model(family)
    for prompt, near, options in ((make_prompt(3, pad=9), None, BEAM), (make_prompt(1, tokens=30), "1MiB", {})):
        plain = generate(model, prompt, **options)
        with farkv.attach(model, XKV(fraction=1.0), near=near) as far:
            assert_same(generate(model, prompt, far.new_cache(), **options), plain)


def test_the_default_keeps_a_short_text_whole() -> None:
    model, prompt = make_model("llama"), make_prompt(1, tokens=50)
    plain = generate(model, prompt)
    with farkv.attach(model, XKV()) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)
        assert far.receipt().kept_fraction == 1.0
    with farkv.attach(model, XKV()) as far:
        forward(model, make_prompt(1, tokens=200)["input_ids"], far.new_cache())
        assert far.receipt().kept_fraction <= 0.384


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("prompt", [SINGLE, PADDED], ids=["single", "padded"])
def test_the_published_variant_keeps_what_snapkv_selects_and_xkv_allocates(family: str, prompt: Any) -> None:
    model, total = make_model(family), 48
    scores = score_plainly(model, prompt)
    with farkv.attach(model, XKV(tokens=total, paper=True)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    store = cache.engine.store
    counts = np.array([store.length(i) - 8 for i in range(4)])
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    assert counts.sum() == total
    best = allocate(gains, tokens=total)
    assert measure_retention(gains, counts) >= measure_retention(gains, best) - 1e-6
    assert measure_retention(gains, best) > measure_retention(gains, np.full(4, total // 4)) + 1e-5
    for i in range(4):
        assert_best_are_kept(places(store, i), scores[i], TOKENS)


@pytest.mark.parametrize("prompt", [SINGLE, PADDED], ids=["single", "padded"])
def test_a_planned_prompt_keeps_the_best_by_the_very_scores(prompt: Any) -> None:
    model = make_model("llama")
    shares = (0.2, 0.5, 0.3, 0.8)
    scores = score_plainly(model, prompt)
    with farkv.attach(model, XKV(sinks=0, paper=True), plan=make_shares(model, keep=shares)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    for i, share in enumerate(shares):
        assert cache.engine.store.length(i) == int(share * TOKENS)
        assert_best_are_kept(places(cache.engine.store, i), scores[i], TOKENS, close=1e-4)


def test_the_published_variant_grows_by_every_token() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=0.3, paper=True)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        first = [cache.engine.store.length(i) for i in range(4)]
        for t in range(30):
            forward(model, IDS[:, t : t + 1], cache)
            assert [cache.engine.store.length(i) for i in range(4)] == [n + t + 1 for n in first]
