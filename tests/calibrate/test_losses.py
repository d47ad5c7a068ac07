"""Curves between measured losses never rise, end at zero, and survive a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.calibrate.losses import SHARES, Losses
from farkv.errors import ProfileError

CELLS = np.array([1, 3, 10, 50, 100, 400, 700, 999, 1000])


def make(rows: torch.Tensor) -> Losses:
    return Losses(rows, rows / 2, SHARES, tuple(range(len(rows))), 3)


@given(st.integers(0, 2**31))
def test_a_larger_share_never_loses_more(seed: int) -> None:
    rows = (torch.rand(3, len(SHARES), generator=torch.Generator().manual_seed(seed)) - 0.1).clamp_min(0)
    found = make(rows).interpolate("keep", CELLS, 1000)
    assert (np.diff(found, axis=1) <= 0).all()
    assert (found >= 0).all()
    assert (found[:, -1] == 0).all(), "with everything there is no loss"


def test_it_meets_the_measured_points() -> None:
    rows = torch.linspace(2, 0.1, len(SHARES)).repeat(2, 1)
    cells = np.array([round(s * 10000) for s in SHARES])
    assert np.allclose(make(rows).interpolate("keep", cells, 10000), rows.numpy(), atol=1e-6)
    assert np.allclose(make(rows).interpolate("fetch", cells, 10000), rows.numpy() / 2, atol=1e-6)
    assert np.allclose(make(rows).interpolate("keep", np.array([1]), 10000)[:, 0], 2), "below the least: as the least"


def test_a_file_holds_them() -> None:
    losses = make(torch.rand(2, len(SHARES)))
    again = Losses.from_tensors(losses.to_tensors(), losses.notes)
    assert torch.equal(again.keep, losses.keep)
    assert torch.equal(again.fetch, losses.fetch)
    assert (again.shares, again.layers, again.prompts) == (losses.shares, losses.layers, losses.prompts)


@pytest.mark.parametrize("damage", ["notes", "missing", "shape", "nan", "negative", "shares", "prompts", "layers"])
def test_damage_is_said(damage: str) -> None:
    losses = make(torch.rand(2, len(SHARES)))
    tensors, notes = losses.to_tensors(), losses.notes
    if damage == "notes":
        notes = "{"
    elif damage == "missing":
        del tensors["losses.fetch"]
    elif damage == "shape":
        notes = json.dumps({**json.loads(notes), "layers": [0]})
    elif damage in ("shares", "prompts", "layers"):
        wrong = {"shares": [0.5, *SHARES[1:]], "prompts": True, "layers": [1, 0]}
        notes = json.dumps({**json.loads(notes), damage: wrong[damage]})
    else:
        tensors["losses.keep"][0, 0] = torch.nan if damage == "nan" else -1.0
    with pytest.raises(ProfileError, match="farkv profile"):
        Losses.from_tensors(tensors, notes)
