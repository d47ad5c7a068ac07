"""Shapes in signatures are executed in tests: without this, every annotation would be a comment."""

from __future__ import annotations

import sys

import pytest
import torch
from jaxtyping import TypeCheckError

import farkv
from farkv.math.score import pool_group


def test_a_right_shape_passes() -> None:
    pooled = pool_group(torch.zeros(2, 3, 4, 5), torch.ones(2, 1, 5, dtype=torch.bool))
    assert pooled.shape == (2, 3, 5)


def test_a_missing_axis_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        pool_group(torch.zeros(2, 3, 5), None)


def test_two_arguments_must_agree_on_an_axis() -> None:
    with pytest.raises(TypeCheckError):
        pool_group(torch.zeros(2, 3, 4, 5), torch.ones(2, 1, 6, dtype=torch.bool))


def test_a_wrong_dtype_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        pool_group(torch.zeros(2, 3, 4, 5, dtype=torch.float64), None)


def test_no_module_was_imported_before_the_hook() -> None:
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == farkv.__name__ and m.__file__]
    # The hook adds this import to every module that it checks; an empty __init__.py stays empty.
    unchecked = [m.__name__ for m in modules if not hasattr(m, "jaxtyping") and m.__doc__]
    assert unchecked == []
