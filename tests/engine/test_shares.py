"""Shares: layers keep what a budget allows them, of a prompt and while decoding, and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import farkv
from farkv.math.allocate import allocate, measure_retention
from farkv.methods import XKV, InfiniGen, Method
from tests.engine.kept import SINGLE, TOKENS, KeptTape
from tests.methods.evictors import curve_plainly, score_plainly
from tests.models import forward, make_model, make_prompt


@pytest.mark.parametrize("retention", [0.5, 0.8, 0.95])
def test_a_retention_is_reached_with_the_fewest_records(retention: float) -> None:
    model = make_model("llama")
    scores = score_plainly(model, SINGLE)
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    with farkv.attach(model, XKV(retention=retention, sinks=0)) as far:
        cache = far.new_cache()
        model(**SINGLE, past_key_values=cache)
    held = np.array([cache.engine.store.length(i) - 8 for i in range(4)])
    assert measure_retention(gains, held) >= retention - 1e-6
    assert 0 <= held.sum() - allocate(gains, retention=retention).sum() <= 4, "one record per layer rounds up"


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("rule", ["xkv", "maxmin", "uniform", "pyramid"])
def test_a_fraction_is_allocated_by_the_rule_and_never_passed(fraction: float, rule: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=fraction, rule=rule, sinks=0, paper=True)) as far:
        cache = far.new_cache()
        model(**SINGLE, past_key_values=cache)
        receipt = far.receipt()
    assert receipt.kept_fraction <= fraction
    held = [cache.engine.store.length(i) for i in range(4)]
    assert sum(held) == 4 * int(fraction * TOKENS)
    scores = score_plainly(model, SINGLE)
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    expected = allocate(gains, tokens=sum(held) - 32, rule=rule) + 8
    assert np.abs(np.array(held) - expected).max() <= 1, "a tie of float32 and float64 at most"


# --- decoding stays within --------------------------------------------------------------------------------------

CAPPED: dict[str, tuple[Method, ...]] = {
    "fraction": (XKV(fraction=0.3),),
    "default": (XKV(),),
    "infinigen+keep": (InfiniGen(fraction=0.1), XKV(fraction=0.3)),
    "tokens": (XKV(tokens=60),),
    "retention": (XKV(retention=0.6),),
}


@pytest.mark.parametrize(
    ("method", "prompt_tokens"),
    [("fraction", 12), ("fraction", 120), ("default", 120), ("infinigen+keep", 12), ("tokens", 12), ("retention", 120)],
)
@pytest.mark.parametrize("n_new", [90, pytest.param(400, marks=pytest.mark.slow)])
def test_decoding_stays_within_the_budget(method: str, prompt_tokens: int, n_new: int) -> None:
    model, methods = make_model("llama", num_hidden_layers=2), CAPPED[method]
    xkv = methods[-1]
    assert isinstance(xkv, XKV)
    ids = make_prompt(1, tokens=prompt_tokens + n_new)["input_ids"]
    with farkv.attach(model, *methods) as far:
        cache = far.new_cache()
        store = cache.engine.store
        with KeptTape(model, cache) as tape:
            forward(model, ids[:, :prompt_tokens], cache)
            first = [store.length(i) for i in (0, 1)]
            for t in range(prompt_tokens, prompt_tokens + n_new):
                forward(model, ids[:, t : t + 1], cache)
                rows = [store.length(i) for i in (0, 1)]
                read = [tape.passes[-1].reads[i][0].shape[-1] for i in (0, 1)]
                assert store.seen(0) == t + 1
                if xkv.tokens is not None:
                    assert max(sum(read), sum(rows)) <= xkv.tokens + 2 * 8
                elif xkv.retention is not None:
                    # The shares that the prompt got, of a context that grows.
                    most = [9 + (n - 8) / prompt_tokens * (t + 1) for n in first]
                    assert all(n <= m for n, m in zip(read, most, strict=True))
                elif t + 1 > (cache.engine.parts.eviction.shares.least + 1) / xkv.keep_rule.fraction:
                    assert max(sum(read), sum(rows)) <= xkv.keep_rule.fraction * 2 * (t + 1)
        receipt = far.receipt()
    if xkv.fraction is not None:
        assert receipt.kept_fraction <= xkv.fraction
        # Not far below either: what is evicted at once is a sixteenth.
        assert receipt.kept_fraction >= 0.85 * xkv.fraction
