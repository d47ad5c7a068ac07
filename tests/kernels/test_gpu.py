"""The GPU's kernels take the calls that the native ones take."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any, NamedTuple

import pytest
import torch

from farkv.kernels import gpu
from farkv.kernels.native import IndexView, Native, Rows
from farkv.math.logits import Logits
from tests.kernels.gpu_interpreter import DEVICE, GPU, HAS_GPU, LARGER, MARKS

pytestmark = MARKS
METHODS = ("select", "attend", "gather", "read_bandwidth", "gather_bandwidth", "can_read")


@pytest.mark.parametrize("name", METHODS)
def test_a_call_of_the_native_kernels_is_one_of_these(name: str) -> None:
    ours = inspect.signature(getattr(gpu.Gpu, name)).parameters
    theirs = dict(inspect.signature(getattr(Native, name)).parameters)
    # Counts that stay on a device are not varied; nothing is drawn there, and pages are chosen by plain operations.
    for only_native in ("varied", "drawn", "paged", "odds"):
        theirs.pop(only_native, None)
    assert [p for p in ours if p in theirs] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default)
    # What only a GPU takes can be left out.
    assert all(ours[key].default is not inspect.Parameter.empty for key in ours.keys() - theirs.keys())


def test_a_copied_cache_shares_its_kernels() -> None:
    assert copy.deepcopy({"kernels": GPU})["kernels"] is GPU


class Step(NamedTuple):
    """One layer's step as a recipe runs it: choose by the index, bring what is not near, attend to what was brought."""

    q: torch.Tensor
    index: IndexView
    far: torch.Tensor
    copies: gpu.NearCopies
    near: torch.Tensor
    crossed: torch.Tensor

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        n, cap = self.far.shape[2], self.near.shape[2]
        chosen = GPU.select(self.q, self.index, Logits(0.3), cap=cap, n=n, sinks=2)
        GPU.fetch(self.far, chosen, self.near, self.crossed, copies=self.copies)
        out = GPU.attend(self.q, Rows(self.near, 16, 16), Logits(0.3), positions=None, n=cap)
        return chosen, out


def make_step(cap: int = 24) -> Step:
    n, cap = 90 * LARGER, cap * LARGER
    far = torch.randn(1, 2, n, 32, dtype=torch.float16)
    codes = torch.randint(-128, 128, (1, 2, n, 4), dtype=torch.int8, device=DEVICE)
    index = IndexView(codes, torch.randn(1, 2, 16, 8, device=DEVICE), torch.randn(1, 2, 128, 1, device=DEVICE))
    slots = torch.full((1, 2, n), -1, dtype=torch.int32, device=DEVICE)
    slots[..., : n // 2] = torch.arange(n // 2, dtype=torch.int32, device=DEVICE)
    copies = gpu.NearCopies(far[:, :, : n // 2].to(DEVICE).contiguous(), slots)
    near = torch.zeros(1, 2, cap, 32, dtype=torch.float16, device=DEVICE)
    q = torch.randn(1, 4, 1, 16, dtype=torch.float16, device=DEVICE)
    far = far.pin_memory() if HAS_GPU else far
    return Step(q, index, far, copies, near, torch.zeros(1, dtype=torch.int64, device=DEVICE))


def assert_step(step: Step, chosen: torch.Tensor, out: torch.Tensor, crossed: int) -> None:
    pool = step.far.to(DEVICE)
    expected = GPU.attend(step.q, Rows(pool, 16, 16), Logits(0.3), positions=chosen, n=pool.shape[2])
    assert torch.equal(out, expected)
    assert crossed == 64 * int((chosen >= step.far.shape[2] // 2).sum())


def test_a_step_reads_what_was_chosen_and_brings_the_difference() -> None:
    step = make_step()
    chosen, out = step.run()
    assert_step(step, chosen, out, int(step.crossed))


@pytest.mark.gpu
def test_a_step_is_one_graph() -> None:
    step = make_step()
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen, out = step.run()
    for _ in range(3):
        step.q.normal_()
        step.crossed.zero_()
        graph.replay()
        assert_step(step, chosen, out, int(step.crossed))


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
