"""Prompts that were saved are asked again as they stand; what is no prompt is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farkv.errors import InputError
from farkv.evals.row import PROMPTS, RESULTS, read_rows
from farkv.evals.run import run_eval
from farkv.evals.saved import SavedPrompts
from farkv.evals.text import Maker
from tests.evals.asked import PLAN, make

TASKS = ("niah_multikey", "multiturn", "longgen", "ppl")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts of every kind of task, answered by the full cache."""
    out = tmp_path_factory.mktemp("saved")
    run_eval(PLAN._replace(tasks=TASKS, methods=("full",), save_prompts=True), out)
    return out


def test_a_saved_prompt_is_the_sample_that_was_made(saved: Path) -> None:
    prompts = SavedPrompts(saved / PROMPTS)
    for task in TASKS:
        assert prompts.find(task, 512, range(2)) == [make(task, 512, seed) for seed in range(2)]
    # As many as there are.
    assert len(prompts.find("ppl", 512, range(9))) == 2


def test_other_filler_elsewhere_changes_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has other packages, and would make other prompts."""

    def refuse(self: Maker, task: str, length: int, seed: int) -> Any:
        raise AssertionError("a prompt was made")

    monkeypatch.setattr(Maker, "make", refuse)
    run_eval(PLAN._replace(tasks=TASKS, methods=("full",), prompts=str(saved / PROMPTS)), tmp_path)
    there, here = (
        {row.key: (row.prompt_sha, row.answer, row.tokens) for row in read_rows(out / RESULTS)}
        for out in (saved, tmp_path)
    )
    assert here == there and len(here) == 8


def change(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: record | {name: value}


@pytest.mark.parametrize(
    "edit, why",
    [
        (change("text", "another text"), "expected the prompt [0-9a-f]{16}, got"),
        (change("length", "512"), "line 1: expected a prompt of farkv eval"),
        (change("seed", True), "line 1: expected a prompt of farkv eval"),
        (change("turns", [{"completion": "?"}]), "line 1: expected a prompt of farkv eval"),
        (change("depths", ["deep"]), "line 1: expected a prompt of farkv eval"),
        (lambda record: {}, "line 1: expected a prompt of farkv eval"),
    ],
)
def test_what_is_no_saved_prompt_is_refused(
    edit: Callable[[dict[str, Any]], dict[str, Any]], why: str, saved: Path, tmp_path: Path
) -> None:
    record = json.loads((saved / PROMPTS).read_text().splitlines()[0])
    (tmp_path / PROMPTS).write_text(json.dumps(edit(record)) + "\n")
    with pytest.raises(InputError, match=why):
        SavedPrompts(tmp_path / PROMPTS)


def test_a_file_that_is_not_there_and_a_cell_that_is_not_in_it_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        SavedPrompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="expected ppl at 1024 tokens, got longgen/512, multiturn/512"):
        SavedPrompts(saved / PROMPTS).find("ppl", 1024, range(2))
