"""A whole evaluation on the demo model: rows, proofs, gates, resuming, refusals; sharing a prefill is honest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farkv.errors import ConfigError, InputError
from farkv.evals.describe import EvalPlan
from farkv.evals.row import PROMPTS, RESULTS, RUN, Key, read_rows
from farkv.evals.run import run_eval
from farkv.files import append_line
from tests.evals.asked import PLAN, judge, make

# What the issue wants of every line.
KEYS = (
    "task", "method", "fraction", "length", "seed", "answer", "expected", "score", "read_fraction", "index_fraction",
    "prompt_sha", "gated",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a whole run of PLAN wrote."""
    out = tmp_path_factory.mktemp("done")
    run_eval(PLAN, out)
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def test_every_sample_has_a_row_per_method_and_fraction(tmp_path: Path) -> None:
    plan = PLAN._replace(fractions=(0.05, 0.1), tasks=("niah_multikey", "ppl"), limit=1)
    summary = run_eval(plan, tmp_path)
    rows = read_lines(tmp_path)
    assert len(rows) == len(summary.rows) == 2 * (1 + 2 * 2)
    assert len({tuple(row[k] for k in Key._fields) for row in rows}) == len(rows)
    assert all(k in row for row in rows for k in KEYS)
    for row in rows:
        full = row["method"] == "full"
        assert row["proof"] == ("everything" if full else "sparse")
        assert row["steps"] > 0
        assert row["read_fraction"] <= row["fraction"] + 2 / row["tokens"]
        assert (row["bytes_per_step"] < row["full_bytes_per_step"]) is not full
        assert row["kl"] >= 0
        assert 0 <= row["top1"] <= 1
        assert (row["nll"] is not None) == (row["task"] == "ppl")
    assert all((row["kl"], row["top1"]) == (0, 1) for row in rows if row["method"] == "full")
    run = json.loads((tmp_path / RUN).read_text())
    assert run["model_sha"]
    assert run["versions"]["torch"]
    reads = [json.loads(line) for line in (tmp_path / "reads.jsonl").read_text().splitlines()]
    assert {(r["method"], r["task"]) for r in reads} == {(m, t) for m in ("infinigen", "window") for t in plan.tasks}


def test_a_run_goes_on_where_it_was_cut(out: Path) -> None:
    path = out / RESULTS
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert run_eval(PLAN, out).written == len(lines) - 3

    def steady(line: str) -> dict[str, Any]:
        row = json.loads(line)
        return {k: v for k, v in row.items() if k not in ("decode_s", "tokens_per_s")}

    assert sorted(map(repr, map(steady, lines))) == sorted(map(repr, map(steady, path.read_text().splitlines())))
    assert run_eval(PLAN, out).written == 0


def test_more_methods_join_the_same_folder(out: Path) -> None:
    assert run_eval(PLAN._replace(methods=("random",)), out).written == 2
    assert json.loads((out / RUN).read_text())["methods"] == ["full", "infinigen", "window", "random"]


def test_a_folder_of_another_run_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run with seed 0"):
        run_eval(PLAN._replace(seed=5), out)
    (out / RESULTS).write_text("{}\n")
    with pytest.raises(InputError, match=r"results.jsonl, line 1"):
        run_eval(PLAN, out)


def test_tasks_that_the_full_cache_fails_are_gated(tmp_path: Path) -> None:
    """The demo model never learned to count words; how near it stays to the full cache is measured all the same."""
    rows = read_lines_of(PLAN._replace(tasks=("cwe",), methods=("window",)), tmp_path)
    assert len(rows) == 4
    assert all(row["gated"] for row in rows)
    assert all(row["kl"] > 0 for row in rows if row["method"] == "window")


def read_lines_of(plan: EvalPlan, out: Path) -> list[dict[str, Any]]:
    run_eval(plan, out)
    return read_lines(out)


def test_saved_prompts_hold_the_tokens(tmp_path: Path) -> None:
    run_eval(PLAN._replace(methods=("full",), save_prompts=True), tmp_path)
    prompts = [json.loads(line) for line in (tmp_path / PROMPTS).read_text().splitlines()]
    assert [prompt["tokens"] for prompt in prompts] == [
        judge().prompter.list_tokens(make("niah_multikey", 512, seed)) for seed in range(2)
    ]
    fed = [tokens["text"] + turn["question"] for tokens in (p["tokens"] for p in prompts) for turn in tokens["turns"]]
    assert [len(ids) for ids in fed] == [row["tokens"] for row in read_lines(tmp_path)]


def test_what_a_method_cannot_do_is_skipped_and_said(tmp_path: Path) -> None:
    summary = run_eval(PLAN._replace(methods=("infinigen-paper",), limit=1), tmp_path)
    assert [(s["method"], s["fraction"]) for s in summary.skipped] == [("infinigen-paper", 0.1)]
    assert "must be above" in summary.skipped[0]["why"]
    assert [row.method for row in summary.rows] == ["full"]


def test_several_processes_write_the_same(done: Path, tmp_path: Path) -> None:
    two = run_eval(PLAN._replace(methods=("window",), workers=2), tmp_path)
    one = [row for row in read_rows(done / RESULTS) if row.key.method in {"full", "window"}]
    assert len(one) == 4
    assert {(r.key, r.answer, r.score) for r in one} == {(r.key, r.answer, r.score) for r in two.rows}


@pytest.mark.parametrize("plan", [PLAN._replace(methods=("magic",)), PLAN._replace(tasks=("magic",)),
                                  PLAN._replace(lengths=(10**6,)), PLAN._replace(filler="latin")])  # fmt: skip
def test_unknown_names_are_refused(plan: EvalPlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected|positions"):
        run_eval(plan, tmp_path)


def test_results_are_the_users_alone_and_half_letters_survive(done: Path, tmp_path: Path) -> None:
    assert {p.stat().st_mode & 0o777 for p in done.iterdir()} == {0o600}
    row = replace(read_rows(done / RESULTS)[0], answer="half \ud800 \u2028 ☺")
    append_line(tmp_path / RESULTS, row.to_json())
    assert read_rows(tmp_path / RESULTS) == [row]
    whole = (tmp_path / RESULTS).read_bytes()
    # Cut in the middle of a letter.
    (tmp_path / RESULTS).write_bytes(whole + whole[: whole.index("☺".encode()) + 1])
    assert read_rows(tmp_path / RESULTS, mend=True) == [row]
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_rows_survive_being_written(done: Path) -> None:
    rows = read_rows(done / RESULTS)
    assert [json.loads(row.to_json()) for row in rows] == read_lines(done)
