"""The public names: few, sorted, all there."""

from __future__ import annotations

import types

import farkv


def test_at_most_ten_names_once_each_and_there() -> None:
    names = farkv.__all__
    assert len(names) <= 10
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
