"""InfiniGen's own steps: what it finds, what it keeps up to date, what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import ConfigError
from farkv.methods import InfiniGen, Oracle
from tests.hf.tape import Tape
from tests.models import forward, generate, make_model, make_prompt

IDS = make_prompt(2, tokens=90)["input_ids"]


def reads(method: Any, profile: Any = False) -> list[dict[int, Any]]:
    model = make_model("llama")
    with farkv.attach(model, method, profile=profile) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            forward(model, IDS[:, :80], cache)
            for t in range(80, 84):
                forward(model, IDS[:, t : t + 1], cache)
    return [p.reads for p in tape.decode()]


def overlap(a: Any, b: Any) -> float:
    """Return the share of a's records that b holds too."""
    found = [
        len(set(x.tolist()) & set(y.tolist())) / len(x)
        for x, y in zip(a[0].flatten(0, 1), b[0].flatten(0, 1), strict=True)
    ]
    return sum(found) / len(found)


def test_the_first_layer_with_all_columns_chooses_what_the_oracle_chooses() -> None:
    # Layer 0 has its true query, and eight columns of eight in eight bits lose only their rounding.
    ours = reads(InfiniGen(fraction=0.3, columns=8, index_bits=8, sampled=False, sinks=0, window=0))
    best = reads(Oracle(fraction=0.3, sinks=0, window=0))
    shares = [overlap(a[0], b[0]) for a, b in zip(ours, best, strict=True)]
    assert min(shares) > 0.9


@pytest.mark.parametrize("source", ["attn", "residual", "post_attn"])
def test_speculation_beats_chance(source: Any) -> None:
    ours = reads(InfiniGen(fraction=0.3, columns=8, sinks=0, window=0, source=source))
    best = reads(Oracle(fraction=0.3, sinks=0, window=0))
    shares = [overlap(a[i], b[i]) for a, b in zip(ours, best, strict=True) for i in (1, 2, 3)]
    assert sum(shares) / len(shares) > 0.3 + 0.1


def test_the_index_follows_every_token() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache()
        engine = cache.engine
        for piece in (IDS[:, :20], IDS[:, 20:50], *IDS[:, 50:56].split(1, 1), IDS[:, 56:90]):
            forward(model, piece, cache)
        forward(model, IDS[:, :1], cache)
        cache.crop(-5)
        forward(model, IDS[:, :1], cache)
        for i, fit in engine.selector.fits.items():
            index = fit.index
            # The newest tokens join when they leave the window, at the latest.
            assert engine.store.length(i) - 1 <= index.length <= engine.store.length(i)
            projection = index.projection
            keys = engine.store.keys(i)[:, :, : index.length]
            stored = engine.selector.coder.encode(keys, projection)
            assert (stored != index.codes()).float().mean() < 0.01


def test_a_short_prompts_skew_is_fitted_again() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.3), profile=False) as far:
        cache = far.new_cache()
        forward(model, IDS[:, :10], cache)
        fitted = []
        for t in range(10, 90):
            forward(model, IDS[:, t : t + 1], cache)
            fitted.append(min(cache.engine.selector.fits[1].phase.fitted))
        assert fitted == sorted(fitted)
        assert fitted[-1] >= 64
        assert len(set(fitted)) <= 4, "it doubles, it is not fitted at every step"
        assert all(fit.phase.samples is None for fit in cache.engine.selector.fits.values())
        assert not cache.account.fallbacks


def test_the_share_beside_a_dense_layer() -> None:
    assert InfiniGen(fraction=1.0, paper=True).share_beside_dense(4) == 1.0
    assert InfiniGen(fraction=0.4, paper=True).share_beside_dense(4) == pytest.approx((1.6 - 1) / 3)
    with pytest.raises(ConfigError, match=r"must be above 0\.250"):
        InfiniGen(fraction=0.25, paper=True).share_beside_dense(4)


def test_the_paper_leaves_the_first_layer_dense() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.4, paper=True)) as far:
        generate(model, make_prompt(1, tokens=60), far.new_cache())
        rows = far.receipt().layers
    assert rows[0].read_fraction == 1.0
    assert all(row.read_fraction <= 0.2 + 1e-9 for row in rows[1:])
    assert torch.isfinite(torch.tensor([row.read_fraction for row in rows])).all()


def test_by_its_own_query_a_far_pool_is_chosen_from_as_one_in_place() -> None:
    """`source="query"`: nothing is estimated, on any tier."""
    model, ids = make_model("llama"), make_prompt(2, tokens=90)["input_ids"]

    def run(**storage: Any) -> tuple[torch.Tensor, Any]:
        with farkv.attach(model, InfiniGen(fraction=0.3, source="query"), kernel="plain", **storage) as far:
            cache = far.new_cache(tokens=110, batch=2)
            with torch.no_grad():
                forward(model, ids, cache)
                steps = [forward(model, ids[:, i : i + 1], cache) for i in range(8)]
            return torch.cat(steps, 1), far.receipt(cache)

    here, there = run(), run(near="64MiB")
    assert torch.equal(here[0], there[0])
    assert here[1].read_fraction == there[1].read_fraction < 0.31
    assert there[1].fetched_bytes_per_token > 0
