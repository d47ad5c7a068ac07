"""Drawn reads: exactly as many as asked, certain where heavy, and right in the mean whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farkv.math.sampling import Seen, draw, find_gains, make_seeds, sample_top
from farkv.math.select import force_sinks, select_top


def make_weights(n: int, heads: int = 2, batch: int = 1, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(batch, heads, n, generator=random)).log_softmax(-1)


def seeds_at(tokens: int, batch: int = 1, heads: int = 2, layer: int = 0) -> torch.Tensor:
    return make_seeds(layer, [tokens] * batch, torch.ones(1, heads, dtype=torch.bool))


@given(
    n=st.integers(1, 300), share=st.floats(0, 1), sinks=st.integers(0, 5), tokens=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
)  # fmt: skip
@settings(max_examples=80)
def test_as_many_as_asked_are_read_and_what_is_heavy_is_certain(
    n: int, share: float, sinks: int, tokens: int, spread: float
) -> None:
    weights, cap = make_weights(n, spread=spread), int(share * n)
    chosen = sample_top(force_sinks(weights.clone(), min(sinks, cap), None), cap, seeds_at(tokens))
    assert chosen.positions.shape == (1, 2, cap) and chosen.valid is None and chosen.odds is not None
    assert (chosen.positions.diff(dim=-1) > 0).all()
    read = torch.zeros(1, 2, n, dtype=torch.bool).scatter(-1, chosen.positions, True)
    assert read[..., : min(sinks, cap)].all()
    assert (chosen.odds >= 0).all() and chosen.odds.isfinite().all()
    assert not chosen.odds[chosen.positions < min(sinks, cap)].any()
    if cap == n:
        assert not chosen.odds.any()
    # Read or not, nothing of at least the threshold is left out; what is below it is weighed up to it.
    stands_for = weights.gather(-1, chosen.positions) + chosen.odds
    drawn = torch.where(chosen.odds > 0, stands_for, -torch.inf)
    for h in range(2):
        if (chosen.odds[0, h] > 0).any():
            threshold = drawn[0, h].amax()
            torch.testing.assert_close(
                drawn[0, h][chosen.odds[0, h] > 0], threshold.expand(int((chosen.odds[0, h] > 0).sum()))
            )
            assert weights[0, h][~read[0, h]].amax() <= threshold + 1e-5


@pytest.mark.parametrize("told", [0.0, 1.0])
def test_sums_over_what_is_read_are_right_in_the_mean(told: float) -> None:
    # Even where weights are told wrongly: then they only spread more.
    n, cap = 400, 40
    true = make_weights(n, heads=1, seed=1)
    estimate = (true + told * make_weights(n, heads=1, seed=2, spread=1.0)).log_softmax(-1)
    values = torch.randn(n, generator=torch.Generator().manual_seed(3)) + torch.linspace(-2, 2, n)
    sums = []
    for tokens in range(3000):
        chosen = sample_top(estimate, cap, seeds_at(tokens, heads=1))
        assert chosen.odds is not None
        weight = (true.gather(-1, chosen.positions) + chosen.odds).exp()
        sums.append(torch.stack([weight.sum(), (weight * values[chosen.positions]).sum()]))
    found, exact = torch.stack(sums).double(), torch.stack([torch.tensor(1.0), (true.exp() * values).sum()]).double()
    # Evenly drawn, the threshold is half a record too low: of some thirty that are drawn.
    assert ((found.mean(0) - exact).abs() < 0.025).all()
    # The best alone miss weight at every step.
    best = true.gather(-1, select_top(true, cap).positions).exp().sum()
    assert best < 0.9 and (found[:, 0].mean() - 1).abs() < 0.1 * (1 - best)


def test_without_a_seed_the_best_are_read() -> None:
    weights = make_weights(200)
    seeds = make_seeds(0, [7], torch.tensor([[True, False]]))
    assert seeds[0, 1] == -1 and seeds[0, 0] >= 0
    chosen = sample_top(weights, 20, seeds)
    assert torch.equal(chosen.positions[:, 1], select_top(weights, 20).positions[:, 1])
    assert chosen.odds is not None and not chosen.odds[:, 1].any() and chosen.odds[:, 0].any()


def test_a_padded_sequence_is_read_as_alone() -> None:
    alone, pad, cap = make_weights(90, seed=5), 31, 12
    valid = torch.ones(1, 1, 90 + pad, dtype=torch.bool)
    valid[..., :pad] = False
    padded = torch.nn.functional.pad(alone, (pad, 0), value=-torch.inf)
    own = torch.tensor([[[cap]]])
    a = sample_top(alone, cap, seeds_at(90))
    b = sample_top(padded, cap + 3, seeds_at(90), valid, own)
    assert b.valid is not None and b.odds is not None
    assert torch.equal(a.positions + pad, b.positions[..., :cap]) and torch.equal(
        b.valid.sum(-1), own[:, 0].expand(1, 2)
    )
    torch.testing.assert_close(a.odds, b.odds[..., :cap])


def test_layers_heads_steps_and_neighbours_draw_apart() -> None:
    seeds = torch.stack([seeds_at(tokens, heads=8, layer=layer) for tokens in range(50) for layer in range(10)])
    assert len(seeds.unique()) == seeds.numel() and (seeds >= 0).all() and (seeds < 2**32).all()
    u = draw(seeds[:1, 0], torch.arange(4096)[None, None])
    assert u.min() > 0 and u.max() < 1
    # Even over any stretch: no gap is much wider than the mean.
    for start in (0, 1000, 3000):
        part = u[..., start : start + 256].sort(-1).values
        assert part.diff(dim=-1).amax() < 4 / 256


def make_seen(values: torch.Tensor, spread: float = 0.3) -> Seen:
    """Attention that is nearly flat, told exactly."""
    random = torch.Generator().manual_seed(0)
    n = values.shape[2]
    keys = torch.randn(1, 1, n, 8, generator=random)
    queries = spread * torch.randn(1, 1, 2, 16, 8, generator=random)
    told = queries @ keys[:, :, None].mT
    return Seen(
        queries,
        keys,
        values,
        told,
        torch.ones(1, 1, 1, 16, n, dtype=torch.bool),
        torch.zeros(1, 1, 1, 16, n, dtype=torch.bool),
    )


def test_a_head_is_drawn_where_the_best_differ_from_the_others() -> None:
    random = torch.Generator().manual_seed(1)
    n = 1000
    noise = torch.randn(1, 1, n, 4, generator=random)
    # Values that follow the keys: the best are unlike the rest. Values without a cause: drawing adds noise alone.
    seen = make_seen(noise)
    follow = torch.einsum("hnd,hgmd->hn", seen.keys[0], seen.queries[0])[None, ..., None] + 0.01 * noise
    assert bool(find_gains(make_seen(follow), 0.1, 1.0).all())
    # With as much more to draw from noise averages out; with as much less there is nothing but noise.
    assert bool(find_gains(seen, 0.1, 1e6).all()) and not bool(find_gains(seen, 0.1, 1e-6).any())


def test_what_is_not_a_number_is_not_drawn() -> None:
    values = torch.randn(1, 1, 100, 4)
    values[..., 50, 0] = torch.nan
    assert not bool(find_gains(make_seen(values), 0.1, 1.0).any())
