"""README runs as printed: its Python, and its command lines as far as a test can take them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from farkv.cli.commands import build_command
from farkv.demo import MODEL_PATH
from farkv.demo.text import draw_prompt
from tests.command import farkv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def list_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def list_commands(name: str) -> list[list[str]]:
    """Return the words behind `farkv` of every printed line that runs one of its commands."""
    lines = [line[2:] for block in list_blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True)[1:] for line in lines if ".venv/bin/farkv" in line]
    return [words for words in found if words[0] == name]


def test_the_python_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = list_blocks("python")
    prompt = draw_prompt(400, facts=4)
    inputs = AutoTokenizer.from_pretrained(MODEL_PATH)(prompt.text + prompt.question, return_tensors="pt")
    names: dict[str, Any] = {"name": MODEL_PATH, "inputs": inputs}
    exec(compile(block, "README.md", "exec"), names)
    said = AutoTokenizer.from_pretrained(MODEL_PATH).decode(names["out"][0, inputs["input_ids"].shape[1] :])
    assert said.startswith(prompt.answer)
    assert capsys.readouterr().out.startswith("receipt: infinigen")


@pytest.mark.parametrize("name", ["run", "eval", "report"])
def test_a_command_line_is_taken(name: str) -> None:
    command = build_command(lambda asked: None).commands[name]
    assert list_commands(name)
    for words in list_commands(name):
        command.make_context(name, words[1:])


def test_make_demo_is_the_demo() -> None:
    assert "$ make demo" in README
    makefile = (ROOT / "Makefile").read_text()
    assert "demo: .venv/installed\n\t$(BIN)/farkv demo\n" in makefile


def test_run_as_printed_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model and a text that are there, and a question about it."""
    prompt = draw_prompt(400, facts=4)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(prompt.text)
    (words,) = list_commands("run")
    words = ["demo" if word == "NAME_OR_PATH" else word for word in words[:-1]]
    done = farkv(*words, prompt.question, "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == prompt.answer


def test_an_evaluation_as_printed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts that are short."""
    monkeypatch.chdir(tmp_path)
    (words,), (report,) = list_commands("eval"), list_commands("report")
    done = farkv(*words, "--lengths", "400", "--limit", "1")
    assert done.returncode == 0, done.stderr
    done = farkv(*report)
    assert done.returncode == 0, done.stderr
    assert "<!doctype html>" in Path("report.html").read_text()
