"""Tables: cells that all answered, paired differences, gated cells apart, what is best and what is not told from it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from farkv.errors import InputError
from farkv.evals.cells import Setting, study_rows
from farkv.evals.row import RESULTS
from farkv.evals.show import draw_table, list_columns, number, percent, points, to_grid, to_markdown
from farkv.evals.tables import compare, make_table, read_results
from tests.evals.results import make_row, make_rows, write_folder

METHODS = ("infinigen", "window", "oracle")
SCORES = {"full": [0.0, 0.5, 1.0], "infinigen": [1.0, 0.5, 0.0]}
ROWS = make_rows(METHODS, (0.05, 0.1), ("niah_single", "cwe", "ppl"))


def score_row(method: str, seed: int, score: float, task: str = "vt", **more):
    fraction = 1.0 if method == "full" else 0.1
    return replace(make_row(task, method, fraction, 2048, seed), score=score, **more)


def test_line_is_the_paired_bootstrap_of_its_rows():
    table = make_table(ROWS)
    line = table.find("window", 0.1)
    assert line is not None
    assert line.delta is not None
    scores = {
        method: {(r.task, r.length, r.seed): r.score for r in ROWS if r.method == method and r.fraction in {1.0, 0.1}}
        for method in ("full", "window")
    }
    gaps = {key: scores["window"][key] - scores["full"][key] for key in scores["full"] if key[:2] != ("cwe", 8192)}
    cells = [[gap for key, gap in gaps.items() if key[:2] == cell] for cell in table.cells]
    mean, low, high, n = line.delta.delta
    assert mean == pytest.approx(np.mean([np.mean(cell) for cell in cells]))
    rng = np.random.default_rng(0)
    drawn = np.mean([[np.mean(rng.choice(cell, len(cell))) for _ in range(1000)] for cell in cells], axis=0)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    wins, losses = (sum(sign * gap > 0 for gap in gaps.values()) for sign in (1, -1))
    assert line.delta[1:] == (wins, len(gaps) - wins - losses, losses)
    assert line.score.n == n == 50


def test_a_constant_difference_has_an_interval_of_no_width():
    values = np.random.default_rng(0).integers(0, 64, size=40) / 128
    rows = [score_row("full", i, x) for i, x in enumerate(values)]
    rows += [score_row("infinigen", i, x + 0.25) for i, x in enumerate(values)]
    line = make_table(rows).find("infinigen")
    assert line is not None
    assert line.delta is not None
    assert line.delta.delta == pytest.approx((0.25, 0.25, 0.25, 40), abs=1e-15)
    assert line.delta[1:] == (40, 0, 0)


def test_a_comparison_counts_wins_ties_and_losses():
    cell = study_rows([score_row(m, i, x) for m, found in SCORES.items() for i, x in enumerate(found)]).cells
    found = compare(cell, Setting("infinigen", 0.1), Setting("full", 1.0))
    assert (found.delta.mean, found.delta.n, *found[1:]) == (0.0, 3, 1, 1, 1)
    assert found.delta.low < 0 < found.delta.high


def test_cells_weigh_the_same_and_shifts_are_exact():
    rows = [score_row("full", i, 1.0) for i in range(9)] + [score_row("infinigen", i, 0.75) for i in range(9)]
    rows += [score_row("full", 0, 1.0, "qa"), score_row("infinigen", 0, 0.25, "qa")]
    line = make_table(rows).find("infinigen")
    assert line is not None
    assert line.delta is not None
    assert line.score[:3] == (0.5, 0.5, 0.5)
    assert line.delta.delta[:3] == (-0.5, -0.5, -0.5)
    assert line.delta.losses == 10


def test_gated_cells_are_listed_with_the_full_caches_score():
    table = make_table(ROWS)
    assert ("cwe", 8192) not in table.cells
    assert [(g.task, g.length, g.n) for g in table.gated] == [("cwe", 8192, 10)]
    assert table.gated[0].full == pytest.approx(0.025)
    assert "cwe at 8 K (2.5 %, n = 10)" in to_markdown(table)


def test_a_method_of_one_length_takes_no_cell_from_the_others():
    rows = [*ROWS, *(make_row("ppl", "kvpress:SnapKV", 0.1, 2048, seed) for seed in range(10))]
    study = study_rows(rows)
    table = make_table(study)
    assert table.absent == [Setting("kvpress:SnapKV", 0.1)]
    assert len(table.cells) == 5
    assert make_table(study, tasks=["ppl"], lengths=[2048]).find("kvpress:SnapKV", 0.1) is not None


def test_a_method_that_was_stopped_early_takes_no_sample_from_the_others():
    rows = [row for row in ROWS if row.method != "window" or row.seed < 3]
    assert make_table(rows).samples == 50
    assert make_table(rows).find("window") is None


def test_only_samples_that_all_answered_are_compared():
    rows = [row for row in ROWS if row.method != "window" or row.seed != 4]
    table = make_table(rows)
    assert table.samples == 45
    assert {line.score.n for line in table.lines} == {45}


def test_rows_of_another_prompt_or_without_a_score_are_left_out():
    rows = [replace(row, prompt_sha="other") if row.method == "window" and row.seed == 9 else row for row in ROWS]
    rows[0] = replace(rows[0], score=math.nan)
    study = study_rows(rows)
    # The full cache's own row is the first one: nothing else answered a prompt that is known to be the same.
    assert study.dropped == 12 + 1


def test_best_is_no_upper_bound_and_its_equals_are_marked():
    table = make_table(ROWS)
    marks = {line.setting: line.mark for line in table.lines}
    assert marks[Setting("infinigen", 0.1)] == "best"
    assert marks[Setting("window", 0.1)] == ""
    assert marks[Setting("oracle", 0.1)] == marks[Setting("full", 1.0)] == ""
    scores = [score_row("full", i, 1.0) for i in range(20)]
    scores += [score_row("infinigen", i, float(i > 1)) for i in range(20)]
    scores += [score_row("pages", i, float(i != 5)) for i in range(20)]
    scores += [score_row("h2o", i, 1.0 * (i % 2)) for i in range(20)]
    marked = {line.setting.method: line.mark for line in make_table(scores).lines}
    assert marked == {"full": "", "infinigen": "same", "pages": "best", "h2o": ""}


def test_last_of_equal_keys_counts():
    rows = [score_row("full", 0, 0.0), score_row("full", 0, 1.0)]
    assert make_table(rows).lines[0].score.mean == 1.0


def test_all_gated_gives_an_empty_table():
    table = make_table([replace(row, gated=True) for row in ROWS])
    assert table.lines == []
    assert len(table.gated) == 6
    assert "near the floor" in to_markdown(table)


def test_kl_is_of_the_rows_that_have_one():
    line = make_table(ROWS).find("infinigen", 0.1)
    assert line is not None
    of_ppl = make_table(ROWS, tasks=["ppl"]).find("infinigen", 0.1)
    assert of_ppl is not None
    assert line.measured["kl"] == pytest.approx(of_ppl.measured["kl"])
    only = make_table(ROWS, tasks=["cwe"]).find("infinigen", 0.1)
    assert only is not None
    assert math.isnan(only.measured["kl"])
    assert only.to_dict()["kl"] is None


def test_read_results_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected results\.jsonl"):
        read_results(tmp_path)
    write_folder(tmp_path, [])
    with pytest.raises(InputError, match="empty file"):
        read_results(tmp_path)
    write_folder(tmp_path, ROWS[:3])
    path = tmp_path / RESULTS
    path.write_text(path.read_text("utf-8") + '{"task": "vt", "met', "utf-8")
    with pytest.raises(InputError, match="line 4"):
        read_results(tmp_path)
    write_folder(tmp_path, ROWS[:3])
    first, second, third = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([first, second, third.replace('"length": 2048', '"length": "long"')]), "utf-8")
    # (?s): the checker of types in tests has its say in many lines; without it `check_row` has in one.
    with pytest.raises(InputError, match=r"(?s)line 3.*length"):
        read_results(tmp_path)


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(InputError, match="no rows"):
        study_rows([])
    with pytest.raises(InputError, match="full cache"):
        study_rows([row for row in ROWS if row.method != "full"])
    with pytest.raises(InputError, match="no row has a score"):
        study_rows([replace(row, score=math.nan) for row in ROWS])


def test_texts_for_readme_and_terminal():
    study = study_rows(ROWS)
    table = make_table(study)
    lines = to_markdown(table).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(table.lines)]}) == 1
    assert any(line.startswith("| infinigen") and "**" in line for line in lines)
    grid = to_grid(study, 0.1).splitlines()
    assert grid[0].split()[1:] == "method | mean | 2 K | 8 K | niah_single | cwe | ppl |".split()
    assert [table.title for table in list_columns(study)] == ["mean", "2 K", "8 K", "niah_single", "cwe", "ppl"]
    assert len(grid) == 2 + 4
    console = Console(width=80, file=io.StringIO())
    console.print(draw_table(table))
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers_as_people_read_them():
    assert [percent(0.98), percent(1.0), percent(math.nan), percent(0.5, 0)] == ["98.0 %", "100.0 %", "–", "50 %"]
    assert [points(-0.012), points(0.0), points(-0.0001), points(0.5)] == ["−1.2", "0.0", "0.0", "+50.0"]
    assert [number(x) for x in (0.0, 0.00312, 0.25, 1.25, 14.2, 140.0, math.nan)] == [
        "0", "0.0031", "0.25", "1.2", "14", "140", "–",
    ]  # fmt: skip


def test_table_is_plain_json():
    told = json.loads(json.dumps(make_table(ROWS).to_dict(), allow_nan=False))
    assert told["lines"][1]["method"] == "infinigen"
    assert told["lines"][1]["delta"]["ties"] + told["lines"][1]["delta"]["losses"] <= 50
