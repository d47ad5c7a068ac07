"""Shared set-up: one thread (two cores are often shared), fixed seeds, no gradient, GPU tests only where there is one.

Shapes are executed by `shapes.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile

# What was measured of this machine must not decide a test.
os.environ["FARKV_CACHE_DIR"] = tempfile.mkdtemp(prefix="farkv-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import shapes

# Before anything of farkv is imported.
shapes.install()
torch.set_num_threads(1)
usual = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("farkv", usual)
settings.register_profile("nightly", usual, max_examples=300, derandomize=False, print_blob=True)
settings.load_profile("farkv")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_profile") == "nightly":
        shapes.Calls.limit = sys.maxsize


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def same_seed() -> Iterator[None]:
    shapes.Calls.made.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
