"""Rows of results: whatever stands in a line, it is a row with the fields it should have, or an error in words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from farkv.errors import InputError
from farkv.evals.report.reads import load_reads
from farkv.evals.row import Row, read_rows
from farkv.evals.run import check_old, read_known
from tests.evals.results import make_row

ODD = ("NaN", "Infinity", "1e400", "9" * 400, "true", "null", '"text"', "[]", "{}", "[1]", '"\\ud800"', "[" * 3000)
ROW = make_row("niah_single", "infinigen", 0.1, 2048, 1)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:12])
def test_a_value_of_another_kind_is_refused(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for name in ROW.to_dict():
        path.write_text(json.dumps({**ROW.to_dict(), name: "@"}).replace('"@"', odd) + "\n")
        try:
            (row,) = read_rows(path)
        except InputError as error:
            assert "line 1" in str(error)
            continue
        # What a field may be: an answer of any text, nothing measured, no turns, an empty list.
        assert type(getattr(row, name)) in (str, bool, type(None), list)
        assert Row(**json.loads(row.to_json())) == row


def test_any_damage_to_a_line_is_a_row_or_an_error_in_words(tmp_path: Path) -> None:
    path, whole, rng = tmp_path / "results.jsonl", (ROW.to_json() + "\n").encode() * 3, random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            read_rows(path)
        except InputError as error:
            assert str(path) in str(error)


def test_a_number_that_is_not_finite_is_never_written() -> None:
    with pytest.raises(InputError, match="NaN in the weights"):
        make_row("niah_single", "full", 1.0, 2048, 1, kl=float("nan")).to_json()


def test_an_answer_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    row = make_row("niah_single", "full", 1.0, 2048, 1, answer="a\u2028b\x85c\x0cd")
    (tmp_path / "results.jsonl").write_text(row.to_json() + "\n")
    assert read_rows(tmp_path / "results.jsonl") == [row]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:12])
def test_traces_prompts_and_run_are_checked_too(odd: str, tmp_path: Path) -> None:
    trace = {"task": "niah", "method": "window", "fraction": 0.1, "length": 9, "seed": 1, "layers": [0]}
    trace |= {"step_edges": [0, 1], "position_edges": [0, 9], "read": [[[0.5]]]}
    for name in ("fraction", "length", "seed", "layers", "step_edges", "position_edges", "read"):
        (tmp_path / "reads.jsonl").write_text(json.dumps({**trace, name: "@"}).replace('"@"', odd) + "\n")
        if (name, odd) not in {("step_edges", "[1]"), ("position_edges", "[1]"), ("layers", "[1]")}:
            with pytest.raises(InputError, match=r"reads\.jsonl, line 1"):
                load_reads(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(odd + "\n")
    with pytest.raises(InputError, match="expected the prompts"):
        read_known(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("old", [[], {"tasks": 5}, {"skipped": [1]}, {"skipped": [{"method": []}]}, {"lengths": [[]]}])
def test_a_run_that_cannot_be_merged_is_refused(old: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_old(old)
