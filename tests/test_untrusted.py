"""Files that nobody vouches for: plain files of a bounded size, JSON that says one thing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.untrusted import parse_json, read_file

SCALARS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(SCALARS | TEXTS, lambda v: st.lists(v) | st.dictionaries(TEXTS, v))


@given(VALUES)
def test_what_json_can_say_is_read(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


@given(st.binary())
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    assert parse_json(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "finite"), ("[-Infinity]", "finite"), ("1e400", "finite"), ("9" * 20, "digits"),
        ("-" + "9" * 5000, "digits"),
        ('{"a": 1, "a": 1}', "twice"), ('[{"b": {"a": 1, "a": 2}}]', "twice"), ('"\\ud800"', "surrogate"),
        ("[" * 100_000, "deep"), ('{"a":' * 100_000, "deep"), ("", "Expecting"), ("\ufeff1", "BOM"), ("1 2", "Extra"),
    ],
)  # fmt: skip
def test_what_parsers_differ_on_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes, got 5"):
        read_file(path, 4)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises((OSError, ValueError)):
            read_file(odd, 5)
    # What the system says is empty may have more to give.
    with pytest.raises(ValueError, match="being written"):
        read_file("/proc/self/status", 2**20)
