"""Shapes in signatures are executed in tests: without this, every annotation would be a comment."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, get_type_hints

import jaxtyping
import pytest
import torch
from jaxtyping import TypeCheckError

import farkv
from farkv.math.score import pool_group
from tests import shapes

pytestmark = pytest.mark.skipif(jaxtyping.config.jaxtyping_disable, reason="shapes are not executed")


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


@pytest.mark.parametrize("test", [1, 2])
def test_each_test_checks_the_first_calls(test: int) -> None:
    for _ in range(shapes.Calls.limit if shapes.Calls.limit < 100 else 100):
        with pytest.raises(TypeCheckError):
            pool_group(torch.zeros(2, 3, 5), None)


def test_every_shape_is_executed() -> None:
    """Every module has the hook, and no annotation has a name that is not known at run time: it would hold always."""
    root = Path(farkv.__file__).parent
    for path in root.rglob("*.py"):
        if (
            any(f"from {source} import" in path.read_text() for source in shapes.SOURCES)
            and "lm_eval" not in path.parts
        ):
            importlib.import_module(".".join(("farkv", *path.relative_to(root).with_suffix("").parts)))
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == farkv.__name__]
    assert [m.__name__ for m in modules if not isinstance(m.__loader__, shapes.Loader)] == []
    functions = [f for f in shapes.Calls.functions if f.__module__.startswith("farkv.")]
    assert len(functions) > 150
    hints: dict[Any, Any] = {f: get_type_hints(f) for f in functions}
    assert [f for f in functions if set(hints[f]) < set(inspect.get_annotations(f))] == []
