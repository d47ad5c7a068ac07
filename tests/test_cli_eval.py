"""`farkv eval` as it is run: one object on stdout, results in a folder, one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from farkv.cli.eval import METHODS, SOME, SOME_IN_CODE, evaluate, parse_fractions, split
from farkv.errors import ConfigError, FarKVError
from farkv.evals import methods
from farkv.evals.code_tasks import CODE_TASKS
from farkv.evals.tasks import TASKS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(name="eval")(evaluate)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_it_compares_and_prints_one_object(tmp_path: Path) -> None:
    out = tmp_path / "results"
    ran = call(
        "--tasks", "niah_single", "--methods", "infinigen,window", "--fractions", "0.1", "--lengths", "512",
        "--limit", "1", "--threads", "1", "--out", str(out), "--save-prompts", "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert (told["rows"], told["written"]) == (3, 3)
    assert {line["method"] for line in told["table"]["lines"]} == {"full", "infinigen", "window"}
    assert {line["method"] for line in told["near"] if line["kl"]["mean"] > 0} == {"infinigen", "window"}
    assert {p.name for p in out.iterdir()} == {"results.jsonl", "run.json", "prompts.jsonl", "reads.jsonl"}
    prompt = json.loads((out / "prompts.jsonl").read_text())
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert prompt["prompt_sha"] == row["prompt_sha"]
    assert prompt["turns"][0]["completion"].startswith("print(")
    # The same command again, by the run's own settings: nothing is left to do, and what was cut off is made again.
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:2]))
    again = call("--out", str(out), "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert (json.loads(again.stdout)["rows"], json.loads(again.stdout)["written"]) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fractions", "0"), "fraction: expected a number in"),
        (("--fractions", "x"), "--fractions: expected comma-separated numbers"),
        (("--lengths", "12"), "--lengths: expected numbers of at least 64"),
        (("--form", "poem"), "--form: expected auto, code, completion, chat or prefix"),
        (("--tasks", ","), "--tasks: expected comma-separated names"),
        (("--tasks", "ruler:/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--methods", "h3o"), "expected some of full, infinigen"),
        (("--resume",), "--resume: "),
    ],
)
def test_a_mistake_is_one_error(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ran = call(*arguments, "--out", str(tmp_path))
    assert isinstance(ran.exception, FarKVError)
    assert said in str(ran.exception)
    assert "\n" not in str(ran.exception)


def test_the_help_names_what_there_is() -> None:
    text = " ".join(call("--help").output.split())
    for name in methods.list_methods():
        assert name.removesuffix("-aware") in text
    for name in (*TASKS, *CODE_TASKS, "ppl"):
        assert f" {name}" in text
    assert set(split(SOME, "")) <= {*TASKS, "ppl"}
    assert set(split(SOME_IN_CODE, "")) <= {*CODE_TASKS, "ppl"}
    assert set(split(METHODS, "")) <= set(methods.list_methods())


def test_fractions_are_read() -> None:
    assert parse_fractions("0.02, 0.1") == (0.02, 0.1)
    with pytest.raises(ConfigError):
        parse_fractions("2")
