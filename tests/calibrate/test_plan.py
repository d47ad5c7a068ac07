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
        (change_keep(shares=[0.5, 0.25, float("nan")]), "expected finite numbers, got NaN"),
        (change_keep(shares=[0.5, 0.25, True]), r"shares in \[0, 1\]"),
        (change_keep(shares="abc"), r"shares in \[0, 1\]"),
        (change_keep(retention=[0.5, 0.5, 7]), r"retention in \[0, 1\]"),
        (change_keep(base=1.5), "base"),
        (change_keep(base=True), "base"),
        (change_keep(base=10**400), "digits"),
        (change_keep(rule=["xkv"]), "rule"),
        (change_keep(budget={"ratio": "0.5"}), "budget"),
        (change_keep(losses={"planned": -1}), "losses"),
        (change_keep(more=1), "besides"),
        (change(more=1), "besides"),
        (change(layers=[0, 0, 3]), "ascending layer numbers"),
        (change(layers=[0, 2, 10**12]), "ascending layer numbers"),
        (change(layers=[0, True, 3]), "ascending layer numbers"),
        (change(layers=[0.0, 2, 3]), "ascending layer numbers"),
        (change(identity={"layers": 2}), "identity of texts"),
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


ODD = ("NaN", "-Infinity", "1e400", "9" * 400, "-1", "2", "true", "null", '"0.5"', "[]", "{}", '"\\ud800"', "[" * 3000)


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, inner in pairs for place in list_places(inner, (*path, key)))]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:12])
def test_whatever_stands_in_a_values_place_is_refused_or_can_be_used(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole = json.loads(json.dumps(make_plan().to_dict()))
    n_used = 0
    for place in list_places(whole):
        row: Any = json.loads(json.dumps({"": whole}))
        inner = row
        for key in ("", *place)[:-1]:
            inner = inner[key]
        inner[("", *place)[-1]] = "@"
        path.write_text(json.dumps(row[""]).replace('"@"', odd))
        try:
            plan = Plan.load(path)
        except PlanError:
            continue
        n_used += 1
        # A plan by hand: a number within bounds, a name or a budget, which nothing is computed with.
        plan.save(path)
        assert Plan.load(path) == plan
        assert all(0 <= share <= 1 for a in plan.levers.values() for share in a.shares)
        assert len(plan.to_kvpress()) <= 2**14
    assert n_used == 0 or odd in ("2", "{}", '"0.5"'), f"{n_used} used"


def test_bytes_that_are_no_plain_json_are_refused(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", make_plan()
    plan.save(path)
    whole = path.read_bytes()
    twice = whole.replace(b'"layers"', b'"layers": [0], "layers"')
    for data in (b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole + b"\xff", whole + whole, twice, b""):
        path.write_bytes(data)
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(path)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(PlanError, match="expected at most"):
        Plan.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match="a pipe, expected a file"):
        Plan.load(tmp_path / "pipe")


@pytest.mark.parametrize("part", ["identity", "layers", "levers"])
@pytest.mark.parametrize("odd", [None, 5, "text", [1], {"keep": None}])
def test_a_plan_made_by_hand_is_checked_as_a_file_is(part: str, odd: Any) -> None:
    parts = {"identity": IDENTITY, "layers": (0, 2, 3), "levers": {"keep": make_allocation()}}
    with pytest.raises(PlanError):
        Plan(**{**parts, part: odd})


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
