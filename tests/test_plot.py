"""The picture of a plan: labels that do not overlap, a title that names what was measured."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from farkv import plot
from farkv.calibrate.planning import PlanBudget, make_plan
from farkv.calibrate.profile import Profile
from farkv.demo import MODEL_PATH

DEMO = Profile.load(MODEL_PATH / "profile.safetensors")


def test_labels_are_apart_and_the_outermost_is_there() -> None:
    places = [(0.01 * i, 0.9 + 0.001 * i) for i in range(60)]
    chosen = plot.choose_labels(places)
    assert 59 in chosen
    assert 2 < len(chosen) < 20
    for i, j in combinations(chosen, 2):
        assert max(abs(a - b) for a, b in zip(places[i], places[j], strict=True)) >= plot.LABEL_GAP
    assert plot.choose_labels([(0.0, 0.0), (0.5, 0.5)]) == [0, 1]


def test_the_picture_names_model_prompts_and_units(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = make_plan(DEMO, PlanBudget(ratio=0.2), ("keep", "fetch"))
    out = tmp_path / "plan.svg"
    plot.import_matplotlib().rcParams["svg.fonttype"] = "none"
    plot.plot_plan(plan, DEMO.curves(), out, name="demo")
    said = out.read_text()
    for words in ("demo: 8 layers, 64 prompts of", "records, % of the context", "attention mass held, %", ">layer<"):
        assert words in said
