"""Where records are: every combination of limits, device and kind of method has one placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from farkv.store.far.page_file import DiskSpace
from farkv.store.placement import Placement, place_records
from farkv.store.records import Needs, StoreLimits
from farkv.store.tiers import Store

IN_PLACE, NEAR, CODED, HOST, DISK = Placement
# Limits; where records are for a method that chooses, on a CPU and on a GPU; and for one that reads all that it keeps.
TABLE: list[tuple[str, tuple[Placement, Placement], tuple[Placement, Placement]]] = [
    ("", (IN_PLACE, HOST), (IN_PLACE, NEAR)),
    ("host", (IN_PLACE, HOST), (IN_PLACE, NEAR)),
    ("near", (HOST, HOST), (NEAR, NEAR)),
    ("near host", (HOST, HOST), (NEAR, NEAR)),
    ("quant", (CODED, HOST), (IN_PLACE, NEAR)),
    ("quant host", (CODED, HOST), (IN_PLACE, NEAR)),
    ("quant near", (HOST, HOST), (NEAR, NEAR)),
    ("disk", (DISK, DISK), (IN_PLACE, NEAR)),
    ("disk near", (DISK, DISK), (NEAR, NEAR)),
    ("disk quant", (DISK, DISK), (IN_PLACE, NEAR)),
    ("disk quant near host", (DISK, DISK), (NEAR, NEAR)),
]


def make_limits(names: str, folder: Path) -> StoreLimits:
    """Return limits by their names; of a disk its space."""
    values: dict[str, Any] = {"near": 10**6, "host": 10**6, "quant": "int8", "disk": None}
    if "disk" in names:
        values["disk"] = DiskSpace(folder, None)
    return StoreLimits(**{name: values[name] for name in names.split()})


@pytest.mark.parametrize("lives_near", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("names", "chooses", "keeps"), TABLE, ids=[row[0] or "none" for row in TABLE])
def test_limits_device_and_method_say_where_records_are(
    names: str, chooses: Any, keeps: Any, device: str, lives_near: bool, tmp_path: Path
) -> None:
    limits = make_limits(names, tmp_path)
    try:
        found = place_records(limits, torch.device(device), lives_near=lives_near)
        assert found is (keeps if lives_near else chooses)[device == "cuda"]
        # A saved text is read from a file, whatever else is set.
        saved: Any = limits._replace(saved=object())  # type: ignore[arg-type]
        again = place_records(saved, torch.device(device), lives_near=lives_near)
        assert again is (found if lives_near else DISK)
    finally:
        if limits.disk is not None:
            limits.disk.close()


def test_what_follows_from_a_placement() -> None:
    assert [p for p in Placement if p.is_far] == [CODED, HOST, DISK]
    assert [p for p in Placement if p.travels] == [HOST, DISK]


@pytest.mark.parametrize(
    ("names", "lives_near", "home", "shares"),
    [
        ("host", False, "host", True),
        ("near host", False, "host", False),
        ("near host", True, "near", False),
        ("quant host", False, "host", True),
        ("quant near host", False, "host", False),
        ("disk host", False, "host", True),
        ("disk near host", False, "host", False),
    ],
)
def test_a_placement_says_what_is_counted_where(
    names: str, lives_near: bool, home: str, shares: bool, tmp_path: Path
) -> None:
    limits = make_limits(names, tmp_path)
    store = Store([0], limits, torch.device("cpu"), Needs(2, lives_near=lives_near))
    assert store.home.tier == home
    assert (store.near.parent is store.host) == shares, "where near memory is no tier of its own it is the host's"
    assert store.index.parent is store.near
    assert store.reads_in_place == ("quant" not in names and "disk" not in names)
    if limits.disk is not None:
        limits.disk.close()
