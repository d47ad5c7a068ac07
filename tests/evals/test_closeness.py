"""How near methods are to the full cache: means, marks, what is left out; against sums by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from farkv.evals.closeness import Near, measure_fractions, measure_near
from farkv.evals.near_tables import draw_near, sum_bytes, to_json, write_near
from tests.evals.results import make_row


def rows_of(method: str, fraction: float, kls: dict[tuple[str, int], list[float]], **more: object) -> list:
    return [
        make_row(task, method, fraction, length, seed, kl=kl, top1=1 - kl, **more)
        for (task, length), values in kls.items()
        for seed, kl in enumerate(values)
    ]


PLACES = {("vt", 2048): [0.1, 0.3], ("qa", 2048): [0.2, 0.2, 0.2]}
ROWS = [
    *rows_of("full", 1.0, {place: [0.0] * len(values) for place, values in PLACES.items()}, score=0.0, gated=True),
    *rows_of("infinigen", 0.1, PLACES),
    *rows_of("lowbit", 0.1, {place: [kl / 2 for kl in values] for place, values in PLACES.items()}),
    *rows_of("oracle", 0.1, {place: [kl / 9 for kl in values] for place, values in PLACES.items()}),
]


def find(lines: list[Near], method: str) -> Near:
    return next(line for line in lines if line.setting.method == method)


def test_cells_have_equal_weights_and_gated_ones_count() -> None:
    lines = measure_near(ROWS)
    ours = find(lines, "infinigen")
    assert ours.kl.mean == pytest.approx((0.2 + 0.2) / 2)
    assert ours.top1 == pytest.approx(0.8)
    assert ours.n == 5
    assert ours.score is None
    assert lines[0].setting.is_full


def test_the_nearest_is_marked_and_a_bound_is_not() -> None:
    lines = measure_near(ROWS)
    assert [find(lines, m).mark for m in ("infinigen", "lowbit", "oracle")] == ["", "best", ""]
    assert find(lines, "oracle").bound
    oracle = find(lines, "oracle")
    assert sum_bytes(oracle) == oracle.read_fraction + oracle.index_fraction
    same = [row for row in ROWS if row.method != "lowbit"]
    same += rows_of("lowbit", 0.1, {("vt", 2048): [0.3, 0.1], ("qa", 2048): [0.1, 0.2, 0.3]})
    assert {find(measure_near(same), m).mark for m in ("infinigen", "lowbit")} <= {"best", "same"}


def test_a_cell_that_is_not_finished_takes_no_method_away() -> None:
    begun = [*ROWS, *rows_of("full", 1.0, {("cwe", 2048): [0.0]}), *rows_of("infinigen", 0.1, {("cwe", 2048): [9.0]})]
    assert [(x.setting, x.kl) for x in measure_near(begun)] == [(x.setting, x.kl) for x in measure_near(ROWS)]


def test_what_is_named_is_taken_and_what_misses_a_cell_is_left_out() -> None:
    more = [*ROWS, *rows_of("h2o", 0.1, {("vt", 2048): [0.5, 0.5]})]
    assert "h2o" not in {line.setting.method for line in measure_near(more)}
    lines = measure_near(more, tasks=["vt"], methods=["h2o"])
    assert [line.setting.method for line in lines] == ["full", "h2o"]
    assert lines[1].n == 2
    assert measure_near(ROWS, lengths=[64]) == []


def test_a_fraction_of_more_tasks_keeps_them() -> None:
    few = {("vt", 2048): [0.7, 0.7]}
    more = [*ROWS, *rows_of("infinigen", 0.02, few), *rows_of("lowbit", 0.02, few)]
    lines = measure_fractions(more, [2048])
    assert [(x.setting.method, x.setting.fraction, x.n) for x in lines] == [
        ("full", 1.0, 5), ("infinigen", 0.02, 2), ("lowbit", 0.02, 2),
        ("infinigen", 0.1, 5), ("lowbit", 0.1, 5), ("oracle", 0.1, 5),
    ]  # fmt: skip
    assert [(x.setting, x.kl, x.n) for x in measure_fractions(more)] == [(x.setting, x.kl, x.n) for x in lines]
    assert measure_fractions(more, [64]) == []
    full = [row for row in ROWS if row.method == "full"]
    assert [(x.setting.method, x.n) for x in measure_fractions(full)] == [("full", 5)]


def test_a_sample_that_one_did_not_answer_is_compared_by_none() -> None:
    few = [row for row in ROWS if (row.method, row.task, row.seed) != ("lowbit", "qa", 0)]
    # Two of three are fewer than four fifths: the method is left out instead.
    assert "lowbit" not in {line.setting.method for line in measure_near(few)}


def test_tables_fit_a_terminal_and_say_what_was_read() -> None:
    lines = measure_near(ROWS)
    console = Console(width=80, file=io.StringIO())
    console.print(draw_near(lines))
    text = console.file.getvalue()
    assert "lowbit" in text
    assert "0.10 *" in text
    assert max(map(len, text.splitlines())) <= 80
    table = write_near({"2 K": lines, "8 K": lines[:2]})
    assert " KL, 2 K | " in table.splitlines()[0]
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert {line["method"] for line in to_json(lines)} == {"full", "infinigen", "lowbit", "oracle"}
