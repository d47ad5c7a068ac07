"""Curves on a grid: what they hold is kept, they stay concave, and a file gives them back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.calibrate.curves import GRID, Curves, fill_layers, to_grid
from farkv.errors import ConfigError, ProfileError


def make_gains(n: int, seed: int = 0, power: float = 3.0) -> torch.Tensor:
    gains = torch.rand(n, generator=torch.Generator().manual_seed(seed)).double() ** power
    return (gains.sort(descending=True).values / gains.sum()).float()


def make_curves(n: int = 6, layers: int = 3) -> Curves:
    rows = torch.stack([to_grid(make_gains(300 + i, i, 1 + i % 5)) for i in range(2 * n * layers)])
    keep, spread = rows.view(2, n, layers, GRID)
    settings = {"scorer": "window", "window": 8, "pool": 7}
    return Curves(keep, spread, torch.arange(n) + 300, tuple(range(layers)), settings)


@given(n=st.integers(1, 3000), seed=st.integers(0, 99), power=st.floats(0, 12))
def test_the_grid_is_the_cumulative_curve_cut_at_equal_shares(n: int, seed: int, power: float) -> None:
    gains = make_gains(n, seed, power)
    curve = to_grid(gains)
    total = np.concatenate([[0.0], gains.double().cumsum(0).numpy()])
    expected = np.interp(np.arange(GRID + 1) / GRID, np.arange(n + 1) / n, total)
    assert curve.shape == (GRID,)
    assert curve.dtype == torch.float32
    assert np.abs(curve.double().cumsum(0).numpy() - expected[1:]).max() < 1e-6
    assert bool((curve.diff() <= 0).all())
    assert bool((curve >= 0).all())


def test_a_curve_of_the_grids_own_length_is_itself() -> None:
    gains = make_gains(GRID)
    assert torch.allclose(to_grid(gains), gains, atol=1e-9)
    assert torch.equal(to_grid(torch.ones(1)), torch.full((GRID,), 1 / GRID))
    assert torch.equal(to_grid(torch.zeros(5)), torch.zeros(GRID))


def test_no_gain_is_an_error() -> None:
    with pytest.raises(ConfigError, match="longer prompt"):
        to_grid(torch.zeros(0))


def test_layers_between_are_on_the_line() -> None:
    rows = {1: to_grid(make_gains(50, 1)), 5: to_grid(make_gains(70, 2)), 6: to_grid(make_gains(90, 3))}
    filled = fill_layers(rows, (1, 2, 5, 6))
    assert torch.equal(filled[[0, 2, 3]], torch.stack([rows[1], rows[5], rows[6]]))
    assert torch.allclose(filled[1], 0.75 * rows[1] + 0.25 * rows[5], atol=1e-8)
    assert torch.allclose(filled.sum(-1), torch.ones(4), atol=1e-5)


def test_the_mean_is_a_normalised_gain_curve() -> None:
    curves = make_curves()
    for kind, rows in (("keep", curves.keep), ("spread", curves.spread)):
        mean = curves.mean(kind)
        assert torch.allclose(mean, rows.mean(0), atol=1e-7)
        assert torch.allclose(mean.double().sum(-1), torch.ones(3).double(), atol=1e-6)
        assert bool((mean.diff(dim=-1) <= 0).all())


def test_a_split_is_a_partition_and_reproducible() -> None:
    curves = make_curves(7)
    fit, calibration = curves.split(0.5, seed=3)
    assert sorted([*fit.tokens.tolist(), *calibration.tokens.tolist()]) == curves.tokens.tolist()
    assert {len(fit), len(calibration)} == {3, 4}
    for part in (fit, calibration):
        for i, tokens in enumerate(part.tokens.tolist()):
            assert torch.equal(part.keep[i], curves.keep[tokens - 300])
            assert torch.equal(part.spread[i], curves.spread[tokens - 300])
    assert torch.equal(curves.split(0.5, seed=3)[0].keep, fit.keep)
    assert len({tuple(curves.split(0.5, seed=s)[0].tokens.tolist()) for s in range(8)}) > 1
    assert [len(part) for part in make_curves(2).split(0.01)] == [1, 1]
    with pytest.raises(ConfigError, match="two prompts"):
        make_curves(1).split()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        curves.split(1.0)


def test_half_precision_keeps_the_shape() -> None:
    curves = make_curves()
    tensors = curves.to_tensors()
    assert tensors["curves.keep"].dtype == torch.float16
    again = Curves.from_tensors(tensors, curves.notes)
    assert (again.layers, again.settings) == (curves.layers, curves.settings)
    assert torch.equal(again.tokens, curves.tokens)
    for ours, old in ((again.keep, curves.keep), (again.spread, curves.spread)):
        assert (ours.cumsum(-1) - old.cumsum(-1)).abs().max() < 2e-4
        assert torch.allclose(ours.double().sum(-1), torch.ones(ours.shape[:2]).double(), atol=1e-6)
        assert bool((ours.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("damage", ["missing", "shape", "layers", "nan", "negative", "notes", "tokens"])
def test_tensors_that_do_not_fit_are_refused(damage: str) -> None:
    curves = make_curves()
    tensors, notes = curves.to_tensors(), curves.notes
    if damage == "missing":
        del tensors["curves.spread"]
    elif damage == "shape":
        tensors["curves.keep"] = tensors["curves.keep"][..., :-1]
    elif damage == "layers":
        notes = json.dumps({"layers": [0, 1], "settings": {}})
    elif damage == "nan":
        tensors["curves.keep"][0, 0, 0] = torch.nan
    elif damage == "negative":
        tensors["curves.spread"][0, 0, 0] = -1
    elif damage == "notes":
        notes = "{"
    else:
        tensors["curves.tokens"] = torch.tensor(3)
    with pytest.raises(ProfileError, match="farkv profile"):
        Curves.from_tensors(tensors, notes)
