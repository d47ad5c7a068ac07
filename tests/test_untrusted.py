"""JSON that nobody vouches for says one thing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.untrusted import parse_json

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
