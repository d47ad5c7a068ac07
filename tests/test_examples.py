"""Every example runs as printed, and a method that is one file and one row is a method everywhere."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import farkv
from farkv.cli.commands import app
from farkv.demo import MODEL_PATH
from farkv.demo.text import draw_prompt
from farkv.methods import METHODS
from tests.methods.contract import CASES, Check
from tests.models import assert_same, generate, make_model, make_prompt, plain_cache

EXAMPLES = Path(__file__).parents[1] / "examples"
NEW = EXAMPLES / "new_method.py"
# What each prints last, or that its answers are right.
SAYS = {
    "quickstart.py": "the full cache's tokens: True",
    "limits.py": "refused: host limit",
    "session.py": "bytes per token from disk",
    "profile_and_plan.py": "infinigen+xkv(fetch): ",
    "compare_methods.py": "expected: ",
}


@pytest.fixture(scope="module")
def knorm() -> Iterator[dict[str, Any]]:
    """The example's names; its row is in the table as long as this module runs."""
    yield runpy.run_path(str(NEW), run_name="new_method")
    METHODS.pop("knorm")


def test_each_example_is_tested_and_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, NEW.name}
    assert max(len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")) <= 60


@pytest.mark.parametrize("name", ["quickstart.py", "limits.py", "session.py"])
def test_an_example_takes_another_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another shape, with random weights: it answers nothing right, and every size follows from its own."""
    n_words = json.loads((MODEL_PATH / "config.json").read_text())["vocab_size"]
    make_model("llama", vocab_size=n_words).save_pretrained(tmp_path / "model")
    for file in MODEL_PATH.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "model")])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    assert SAYS[name].split(": ")[0] in said
    assert said.count("refused") == (name == "limits.py")


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    assert SAYS[name] in said
    # Each prints what it expects, and its model finds that.
    expected = said.split("expected")[1].strip(" :").split()[0].strip(",;")
    assert said.count(expected) > 1, said


# --- a new method -----------------------------------------------------------------------------------------------


def test_a_new_method_is_forty_lines() -> None:
    assert len(NEW.read_text().splitlines()) <= 40


def test_its_own_command_line_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, row = draw_prompt(300, facts=4), METHODS.get("knorm")
    text = tmp_path / "code.py"
    text.write_text(prompt.text)
    arguments = ["run", "--method", "knorm", "--file", str(text), prompt.question, "--max-new-tokens", "2", "--json"]
    monkeypatch.setattr(sys, "argv", [str(NEW), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(NEW), run_name="__main__")
    assert not ended.value.code
    METHODS.pop("knorm")
    if row is not None:
        METHODS["knorm"] = row
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["method"] == "knorm"
    assert 0 < receipt["read_fraction"] <= 0.1 + 1e-9
    # One float32 per record of 2 x 32 of them.
    assert receipt["index_fraction"] == pytest.approx(1 / 64, rel=0.1)


def test_it_is_evaluated_and_reported(knorm: dict[str, Any], tmp_path: Path) -> None:
    out, page = tmp_path / "eval", tmp_path / "report.html"
    asked = ["--tasks", "niah_single", "--methods", "knorm,window", "--fractions", "0.2", "--lengths", "400"]
    done = CliRunner().invoke(app, ["eval", *asked, "--limit", "1", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert "knorm" in done.stdout
    done = CliRunner().invoke(app, ["report", str(out), "-o", str(page)])
    assert done.exit_code == 0, done.output
    assert "knorm" in page.read_text()


@pytest.mark.parametrize(("check", "near"), CASES)
def test_it_keeps_the_contract(check: Check, near: str | None, knorm: dict[str, Any]) -> None:
    check((knorm["KNorm"](fraction=0.3),), near)


def test_its_index_follows_the_records(knorm: dict[str, Any]) -> None:
    model, prompt, method = make_model("llama"), make_prompt(2, tokens=60, pad=9), knorm["KNorm"]
    with farkv.attach(model, method(fraction=1.0)) as far:
        assert_same(generate(model, prompt, far.new_cache()), generate(model, prompt, plain_cache(model)))
    tokens = []
    for near in (None, "1MiB"):
        with farkv.attach(model, method(fraction=0.3), near=near) as far:
            cache = far.new_cache()
            generate(model, prompt, cache, n=4)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 0]))
            tokens.append(generate(model, {k: v.flip(0) for k, v in prompt.items()}, cache).sequences)
            assert far.receipt().read_fraction <= 0.3
    assert torch.equal(*tokens)
    whole = generate(model, {k: v.flip(0) for k, v in prompt.items()}, plain_cache(model)).sequences
    assert not torch.equal(tokens[0], whole), "a third of the records is read"
