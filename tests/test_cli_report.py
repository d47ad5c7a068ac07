"""`farkv report`: the page, the JSON, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import farkv, run_process
from tests.evals.results import make_rows, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_rows(("infinigen", "window"), (0.05, 0.1), ("vt", "cwe"), limit=3)
    return write_folder(tmp_path_factory.mktemp("eval"), rows)


def test_report_writes_a_page_and_shows_a_table(folder: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    done = farkv("report", str(folder), "-o", str(page), "--title", "A title & more")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "infinigen" in done.stderr
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert "<title>A title &amp; more</title>" in page.read_text("utf-8")


def test_json_is_one_object(folder: Path, tmp_path: Path):
    done = farkv("report", str(folder), "-o", str(tmp_path / "page.html"), "--json")
    told = json.loads(done.stdout)
    assert told["headline"].startswith("infinigen at 10 %")
    assert {line["method"] for line in told["lines"]} == {"full", "infinigen", "window"}
    assert told["gated"] == [{"task": "cwe", "length": 8192, "full": pytest.approx(0.05 / 3), "n": 3}]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path):
    damaged = write_folder(tmp_path / "damaged", make_rows((), (), ("vt",), (2048,), 1))
    with (damaged / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"task": "v')
    for arguments, expected in [
        ((str(tmp_path / "none"),), "results.jsonl"),
        ((str(damaged),), "line 2"),
        ((str(folder), "-o", str(tmp_path / "none" / "page.html")), "cannot be written"),
    ]:
        done = farkv("report", *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("farkv: ")
        assert expected in done.stderr


def test_the_process_says_it_in_one_line_and_exit_code(tmp_path: Path):
    done = run_process("report", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "expected results.jsonl" in done.stderr
