"""Options: what is good passes, what is bad is refused with a text that helps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from farkv.config import (
    MOST_BYTES,
    check_counts,
    check_flag,
    check_fraction,
    check_name,
    check_seed,
    check_temperature,
    check_text,
    check_window,
    format_bytes,
    parse_bytes,
    parse_disk,
    read_count,
)
from farkv.errors import ConfigError, InputError
from farkv.methods import Full, InfiniGen, Oracle, Random, Window
from farkv.methods.base import Cap

# Of a wrong type, the checker that runs in tests speaks first; users get the ConfigError.
REFUSED = (ConfigError, TypeCheckError)
UNITS = {"": 1, "B": 1, "K": 2**10, "KiB": 2**10, "kb": 10**3, "MiB": 2**20, "m": 2**20, "GB": 10**9, "TiB": 2**40}


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_sizes_are_number_times_unit(n: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{space}{n}{space}{unit}", "near") == n * UNITS[unit]


@given(st.integers(1, 10**15))
def test_plain_numbers_pass(n: int) -> None:
    assert parse_bytes(n, "near") == n


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_bytes(text, "near")
    except ConfigError as error:
        assert "near" in str(error)
    else:
        assert isinstance(size, int)
        assert size > 0


@pytest.mark.parametrize("size", ["", "GiB", "2 GiBs", "-1GiB", "1e9", "0", 0, -5, True, 1.5, "1,5GiB", "2**30"])
def test_bad_sizes_name_the_option(size: Any) -> None:
    with pytest.raises(REFUSED, match=r"host|size"):
        parse_bytes(size, "host")


def test_sizes_for_people() -> None:
    assert parse_bytes(None, "near") is None
    assert parse_bytes("1.5G", "near") == 3 * 2**29
    assert [format_bytes(n) for n in (5, 1536, 3 * 2**29, 2**41)] == ["5 B", "1.5 KiB", "1.5 GiB", "2.0 TiB"]


@pytest.mark.parametrize("size", ["9" * 400, "9" * 9000, f"{2**63}", "8388608TiB", 2**63, 10**400, "9" * 50 + ".5"])
def test_no_size_is_larger_than_a_file_can_be(size: Any) -> None:
    with pytest.raises(ConfigError, match="near: expected at most 9,223,372,036,854,775,807 bytes") as caught:
        parse_bytes(size, "near")
    assert len(str(caught.value)) < 200


def test_sizes_are_exact_to_the_last_byte() -> None:
    assert parse_bytes(str(MOST_BYTES), "near") == MOST_BYTES == parse_bytes(MOST_BYTES, "near")
    assert parse_bytes("0" * 300 + "5", "near") == 5
    assert parse_bytes("8388607.9999999TiB", "near") == 8388607 * 2**40 + 9999999 * 2**40 // 10**7
    assert parse_bytes(".5K", "near") == 512
    with pytest.raises(ConfigError, match="positive number of bytes, got a number of thousands of digits"):
        parse_bytes(-(10**5000), "near")


def test_a_folder_may_have_a_colon(tmp_path: Path) -> None:
    assert parse_disk("/data/kv:100GiB", "disk") == (Path("/data/kv"), 100 * 2**30)
    assert parse_disk("/data/12:30/kv", "disk") == (Path("/data/12:30/kv"), None)
    assert parse_disk("/data/12:30/", "disk") == (Path("/data/12:30"), None)
    assert parse_disk("/data/12:30:1K", "disk") == (Path("/data/12:30"), 1024)
    folder = tmp_path / "run-12:30"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"run-12:30 may be a folder, which exists, or .*run-12 with the limit 30; "):
        parse_disk(str(folder), "disk")
    assert parse_disk(f"{folder}/", "disk") == (folder, None)
    assert parse_disk(f"{folder}:1K", "disk") == (folder, 1024)
    for bad in ("", ":1K", "a\0b:1K", "a\0b", "/data/kv:lots", "/data/kv:" + "9" * 400):
        with pytest.raises(ConfigError):
            parse_disk(bad, "disk")


def test_seeds_are_what_torch_takes() -> None:
    for seed in (0, -(2**63), 2**63, 2**64 - 1):
        check_seed(seed, "seed")
        torch.Generator().manual_seed(seed)
    for bad in (2**64, -(2**63) - 1, 10**5000, 1.0, True, "1", None):
        with pytest.raises(REFUSED, match="seed"):
            check_seed(bad, "seed")  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, 1e-320, 5e-324, 1e-9, 1e30, "1", 10**400])
def test_temperatures_that_nothing_can_be_divided_by_are_refused(temperature: Any) -> None:
    for good in (0.0, 0, 1e-6, 1.0, 2, 1e6):
        check_temperature(good, "--temperature")
    with pytest.raises(REFUSED, match="temperature"):
        check_temperature(temperature, "--temperature")


def test_counts_can_count_something() -> None:
    check_counts(window=2**31 - 1)
    with pytest.raises(ConfigError, match="window: expected an integer from 0 to 2147483647"):
        check_counts(window=2**31)


def test_half_a_letter_is_no_text() -> None:
    check_text("question", "☺ é", "")
    with pytest.raises(InputError, match=r"question: expected text, got '\\udcff' at character 1"):
        check_text("question", "a\udcff")


@pytest.mark.parametrize("method", [Window, Random, Oracle, InfiniGen])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), "0.1"])
def test_bad_fractions_are_refused(method: Any, fraction: Any) -> None:
    with pytest.raises(REFUSED, match=r"fraction: expected a number in \(0, 1\]|'fraction'"):
        method(fraction=fraction)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"source": "nowhere"}, "post_attn"),
        ({"columns": 0}, "columns"),
        ({"sinks": -1}, "sinks"),
        ({"window": 1.5}, "window"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"alpha": 2.0, "top_p": 0.5}, "give one"),
        ({"paper": True, "top_p": 0.5}, "give one"),
        ({"top_up": 1.0}, "top_up"),
        ({"top_up": -0.1}, "top_up"),
    ],
)
def test_bad_infinigen_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(REFUSED, match=text):
        InfiniGen(**options)


def test_other_bad_options() -> None:
    with pytest.raises(ConfigError, match="reads all"):
        Full(fraction=0.5)
    with pytest.raises(ConfigError, match="seed"):
        Random(seed=2**64)
    with pytest.raises(ConfigError, match="sinks"):
        Window(sinks=-1)
    with pytest.raises(TypeError):
        InfiniGen(0.1)  # type: ignore[misc]


def test_defaults_are_filled_in_and_frozen() -> None:
    ours, paper = InfiniGen(), InfiniGen(paper=True)
    assert ours.cap == Cap(0.1, sinks=4, window=16, top_up=0.25, least=64)
    assert (ours.index_rule.source, ours.index_rule.rule) == ("post_attn", None)
    assert paper.cap == Cap(0.2, least=64)
    assert paper.index_rule.source == "attn"
    assert partial(paper.index_rule.rule).keywords == {"alpha": 4.0, "mean": True}
    own = InfiniGen(paper=True, alpha=5.0, sinks=2)
    assert own.cap.sinks == 2
    assert partial(own.index_rule.rule).keywords["alpha"] == 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.fraction = 0.5  # type: ignore[misc]


ODD = [
    math.nan,
    math.inf,
    -1,
    -0.5,
    10**30,
    10**5000,
    True,
    "3",
    "",
    None,
    [],
    {},
    1j,
    object(),
    b"1",
    np.float64("nan"),
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_what_is_no_number_is_refused_in_a_line(odd: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: check_fraction(odd),
        lambda: check_counts(count=odd),
        lambda: check_seed(2**64 if odd == -1 else odd),
        lambda: read_count("tokens", odd),
        lambda: check_name("rule", odd, ("a", "b")),
        lambda: check_window(odd, 7),
    ]
    if not isinstance(odd, bool):
        calls.append(lambda: check_flag(flag=odd))
    for call in calls:
        with pytest.raises(ConfigError) as error:
            call()
        assert len(str(error.value)) < 200
        assert "\n" not in str(error.value)


def test_numbers_of_numpy_count_where_they_are_used_once() -> None:
    assert read_count("tokens", np.int64(3)) == 3
    assert type(read_count("tokens", np.uint8(3))) is int
    check_fraction(np.float64(0.5))
    check_seed(2**64 - 1)
    for size in ("9" * 400, "9" * 60, 2**63, 10**5000, True, 1.5, math.nan):
        with pytest.raises(ConfigError, match="near"):
            parse_bytes(size, "near")
    for disk in (5, b"x", "a\0b", ["x"]):
        with pytest.raises(ConfigError, match="disk"):
            parse_disk(disk, "disk")
