"""The resident set stays within near + host and a constant, in a fresh process; `benchmarks/rss.py` has every tier."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Every tier, with the method that keeps most beside the records.
TIERS = ["host", "host, lru", "near, host", "int8", "int4", "disk", "disk, near", "session"]


def measure(tier: str, method: str, limit: int) -> dict[str, Any]:
    pytest.importorskip("psutil")
    command = [sys.executable, str(BENCHMARKS / "rss.py"), "--child", f"{tier};{method}", "--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("tier", "method"), [("host, lru", "window"), ("disk", "full")])
def test_a_small_limit_is_what_a_process_takes(tier: str, method: str) -> None:
    row = measure(tier, method, 16)
    assert row["holds"], row


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_a_limit_is_what_a_process_takes_in_every_tier(tier: str) -> None:
    row = measure(tier, "infinigen", 64)
    assert row["holds"], row


@pytest.mark.slow
@pytest.mark.parametrize("method", ["xkv", "h2o", "snapkv"])
def test_what_evicts_takes_no_more(method: str) -> None:
    row = measure("near", method, 64)
    assert row["holds"], row
