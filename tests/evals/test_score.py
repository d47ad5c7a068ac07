"""Scores of answers: RULER's shares, fields of JSON, words in order."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.evals.score import SCORES, score_all, score_any, score_json, score_prefix

ROWS = [{"name": "a_b", "code": 1234}, {"name": "c_d", "code": 5678}]
WANTED = (json.dumps(ROWS),)


def test_all_counts_the_expected_strings_in_any_order() -> None:
    assert score_all("7310 and 4821", ("4821", "7310")) == 1.0
    assert score_all("7310", ("4821", "7310")) == 0.5
    assert score_all("", ("4821",)) == 0.0


def test_any_wants_one() -> None:
    assert score_any("from Lisbon, I think", ("lisbon", "oslo")) == 1.0
    assert score_any("from Rome", ("lisbon", "oslo")) == 0.0


def test_prefix_ends_at_the_first_mistake() -> None:
    assert score_prefix("a b x d", ("a", "b", "c", "d")) == 0.5
    assert score_prefix("b a", ("a", "b")) == 0.0
    assert score_prefix("a, b", ("a", "b")) == 1.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (json.dumps(ROWS), 1.0),
        ("here it is: " + json.dumps(ROWS) + " done", 1.0),
        (json.dumps(ROWS[:1]), 2 * 2 / (4 + 2)),
        (json.dumps(ROWS)[:-4], 2 * 2 / (4 + 2)),  # the second object is cut off
        (json.dumps([{**ROWS[0], "code": 9}, ROWS[1]]), 2 * 3 / 8),
        ("nothing", 0.0),
        ("", 0.0),
        ("{" * 3000, 0.0),
    ],
)
def test_json_is_scored_field_by_field(answer: str, score: float) -> None:
    assert score_json(answer, WANTED) == pytest.approx(score)


@given(st.text(max_size=60))
def test_scores_stay_between_0_and_1(answer: str) -> None:
    expected = {"json": WANTED, "letter": ("B",), "number": ("12",)}
    for name, score in SCORES.items():
        assert 0 <= score(answer, expected.get(name, ("a", "b c"))) <= 1
