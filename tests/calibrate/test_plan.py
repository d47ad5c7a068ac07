"""Plan files: what was written is what is read, and nothing else is ever read as a plan."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv import FarKVError, Plan
from farkv.calibrate.plan import FORMAT, Allocation
from farkv.errors import PlanError

IDENTITY = {"architecture": "LlamaForCausalLM", "weights": "abc"}


def make_allocation(shares: tuple[float, ...] = (0.5, 0.25, 0.0), base: int = 0) -> Allocation:
    held = tuple(0.9 for _ in shares)
    return Allocation(shares, base, "xkv", {"ratio": 0.25}, held, held)


def make_plan(**levers: Allocation) -> Plan:
    return Plan(IDENTITY, (0, 2, 3), levers or {"keep": make_allocation(), "fetch": make_allocation((1.0, 0.1, 0.2))})


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(0, 100))
def test_a_saved_plan_is_read_back_to_the_last_bit(shares: list[float], base: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan = make_plan(keep=make_allocation(tuple(shares), base), near=make_allocation())
        plan.save(path)
        loaded = Plan.load(path)
        assert loaded == plan
        assert loaded.path == str(path)
        assert loaded.get("keep").ratio == sum(shares) / 3


def test_the_file_is_json_and_no_pickle(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan.json")
    row = json.loads((tmp_path / "plan.json").read_text())
    assert row["format"] == FORMAT
    assert row["layers"] == [0, 2, 3]
    assert list(row["levers"]) == ["keep", "fetch"]
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    import pickle

    class Boom:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "plan.json").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")
    assert not (tmp_path / "owned").exists()


def change(**parts: Any) -> dict[str, Any]:
    return {**make_plan().to_dict(), **parts}


def change_keep(**parts: Any) -> dict[str, Any]:
    row = make_plan().to_dict()
    row["levers"]["keep"] = {**row["levers"]["keep"], **parts}
    return row


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1, 2], "cannot be read"),
        ({}, "expected format"),
        (change(format="farkv-plan-99"), "expected format farkv-plan-1, got 'farkv-plan-99'"),
        (change(levers={}), "at least one lever"),
        (change(levers=[1]), "cannot be read"),
        (change(layers=[0, 2]), "expected 2 shares"),
        (change(layers="many"), "cannot be read"),
        (change(identity=None), "cannot be read"),
        (change(levers={"fly": make_plan().to_dict()["levers"]["keep"]}), "fly"),
        (change_keep(shares=[0.5, 0.25, 1.5]), r"shares in \[0, 1\]"),
        (change_keep(shares=[0.5, 0.25, -0.1]), r"shares in \[0, 1\]"),
        (change_keep(shares=[0.5, 0.25, float("nan")]), r"shares in \[0, 1\]"),
        (change_keep(shares=[0.5, 0.25]), "expected 3 shares"),
        (change_keep(shares=["a", "b", "c"]), "cannot be read"),
        (change_keep(retention=[0.5]), "expected 3"),
        (change_keep(base=-1), "base"),
        (change_keep(base=None), "cannot be read"),
        (change_keep(budget=3), "cannot be read"),
    ],
)
def test_what_is_no_plan_is_refused(row: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(row))
    with pytest.raises(PlanError, match=says) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_damage_anywhere_is_an_error_and_never_another_plan(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", make_plan()
    plan.save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 17):
        path.write_bytes(whole[:end])
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(path)
    path.write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(PlanError):
        Plan.load(path)
    for missing in ("identity", "layers", "levers"):
        path.write_text(json.dumps({k: v for k, v in plan.to_dict().items() if k != missing}))
        with pytest.raises(PlanError, match=missing):
            Plan.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match=str(path)):
            Plan.load(path)


def test_a_lever_that_is_not_driven_is_named_with_the_remedy() -> None:
    with pytest.raises(PlanError, match=r"has lever keep, fetch, not near.*farkv plan --lever near"):
        make_plan().get("near")


def test_only_its_own_model_and_layers_pass() -> None:
    plan = make_plan()
    plan.check(IDENTITY, [0, 2, 3])
    with pytest.raises(PlanError, match="weights is 'abc', the model's is 'xyz'"):
        plan.check({**IDENTITY, "weights": "xyz"}, [0, 2, 3])
    with pytest.raises(PlanError, match="another is None"):
        plan.check({**IDENTITY, "another": "1"}, [0, 2, 3])
    for layers in ([0, 2], [0, 1, 2], [3, 2, 0]):
        with pytest.raises(PlanError, match="is for layers"):
            plan.check(IDENTITY, layers)
    assert issubclass(PlanError, FarKVError)


def test_a_reader_sees_the_old_file_or_the_whole_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    old, new = make_plan(), make_plan(near=make_allocation())
    old.save(path)
    seen = []
    rename = os.rename

    def look(*names: str, **folders: int) -> None:
        seen.append(Plan.load(path))
        rename(*names, **folders)

    monkeypatch.setattr(os, "rename", look)
    new.save(path)
    assert seen == [old]
    assert Plan.load(path) == new
    # Cut off while it is written: the old one stays.
    monkeypatch.setattr(os, "rename", lambda *names, **folders: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        old.save(path)
    assert Plan.load(path) == new


def test_kvpress_gets_what_is_removed_and_nothing_of_layers_that_are_not_managed() -> None:
    assert make_plan().to_kvpress() == [0.5, 0.0, 0.75, 1.0]
    with pytest.raises(PlanError, match="not keep"):
        make_plan(near=make_allocation()).to_kvpress()


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan().layers = (1,)  # type: ignore[misc]
