"""The public names: few, sorted, all there."""

from __future__ import annotations

import ast
import types
from importlib import import_module
from pathlib import Path

import farkv
from farkv.methods import METHODS


def test_at_most_eleven_names_once_each_and_there() -> None:
    names = farkv.__all__
    assert len(names) <= 11
    assert len(set(names)) == len(names)  # their order is the formatter's
    assert all(getattr(farkv, name) is not None for name in names)


def test_nothing_public_is_left_out() -> None:
    public = {
        name
        for name, value in vars(farkv).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in {"annotations", "TYPE_CHECKING"}
    }
    assert public - {"annotations", "TYPE_CHECKING"} <= set(farkv.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(farkv, "no_such_name")


def test_every_public_name_is_documented() -> None:
    assert all(getattr(farkv, name).__doc__ for name in farkv.__all__)


def test_every_method_is_to_be_had_from_one_place() -> None:
    for row in METHODS.values():
        name = row.config.__name__
        assert name in farkv.methods.__all__
        assert getattr(farkv.methods, name) is row.config
    assert {"Full", "InfiniGen", "XKV"} <= set(farkv.__all__)


def test_an_editor_sees_what_is_imported_late() -> None:
    """What is listed for type checkers is what a first use imports, from the same file; `dir` has it before that."""
    source = Path(farkv.__file__)
    assert source.with_name("py.typed").exists()
    (block,) = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen.pop("methods") == "farkv"
    assert set(seen) == set(farkv.__all__) - {"FarKVError"}
    for name, module in seen.items():
        assert getattr(import_module(str(module)), name) is getattr(farkv, name)
    assert set(dir(farkv)) == {*farkv.__all__, "methods"}
