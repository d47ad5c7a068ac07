"""The GPU's kernels take the calls that the native ones take."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any

import pytest
import torch

from farkv.kernels import gpu
from farkv.kernels.native import Native
from tests.kernels.gpu_interpreter import GPU, MARKS

pytestmark = MARKS
METHODS = ("select", "attend", "gather", "read_bandwidth", "gather_bandwidth", "can_read")


@pytest.mark.parametrize("name", METHODS)
def test_a_call_of_the_native_kernels_is_one_of_these(name: str) -> None:
    ours = inspect.signature(getattr(gpu.Gpu, name)).parameters
    theirs = inspect.signature(getattr(Native, name)).parameters
    assert [p for p in ours if p in theirs] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default)
    # What only a GPU takes can be left out.
    assert all(ours[key].default is not inspect.Parameter.empty for key in ours.keys() - theirs.keys())


def test_a_copied_cache_shares_its_kernels() -> None:
    assert copy.deepcopy({"kernels": GPU})["kernels"] is GPU


def test_without_triton_or_a_device_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def hide(name: str, *args: Any) -> Any:
        return None if name == "triton" else found(name, *args)

    for has_device in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_device=has_device: has_device)
        monkeypatch.setattr(importlib.util, "find_spec", hide if has_device else found)
        gpu.load_gpu.cache_clear()
        assert gpu.load_gpu() is None
    gpu.load_gpu.cache_clear()
