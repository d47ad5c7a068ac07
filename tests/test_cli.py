"""The command line as a user meets it: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FACTS = "apple_river = 4821\nstone_cloud = 1973\n"
QUESTION = "print(apple_river)  # "


def farkv(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "farkv.cli", *arguments],
        capture_output=True, text=True, input=text or "", timeout=120, env=environment, check=False,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(FACTS + "import os\n\n\ndef f(path):\n    return os.path.join(path, 'x')\n" * 20)
    return str(path)


def test_version_and_help() -> None:
    assert farkv("--version").stdout.startswith("farkv ")
    for command in ("run", "profile", "demo"):
        shown = farkv(command, "--help").stdout
        assert "Examples" in shown
        assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--file", "/no/such/file", "q"], "cannot be read"),
        (["--near", "3 lots", "q"], "byte size"),
        (["--near", "0", "q"], "positive"),
        (["--method", "magic", "q"], "expected one of"),
        (["--fraction", "1.5", "q"], "(0, 1]"),
        (["--method", "full", "--paper", "q"], "--paper"),
        ([], "both empty"),
        (["--file", sys.executable, "q"], "not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = farkv("run", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/no/such/folder"], "config.json"),
        (["--model", "nobody/nothing"], "cannot be loaded"),
        (["--host", "10KiB"], "host limit"),
        (["--near", "10KiB"], "near limit"),
        (["--profile", "/no/such/profile"], "cannot be read"),
        (["--dtype", "float7"], "dtype"),
        (["--device", "abacus"], "device"),
    ],
)
def test_what_needs_the_model_is_one_line_too(file: str, arguments: list[str], says: str) -> None:
    done = farkv("run", "--file", file, *arguments, QUESTION)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_json_is_one_object_and_the_answer_is_right(file: str) -> None:
    done = farkv("run", "--model", "demo", "--file", file, "--json", "--verify", "4", "--max-new-tokens", "4", QUESTION)
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["answer"] == "4821"
    assert receipt["model"] == "demo"
    assert receipt["quality"]["steps"] == 4
    assert receipt["generated_tokens"] == 4


def test_answer_on_stdout_receipt_on_stderr(file: str) -> None:
    text = Path(file).read_text()
    done = farkv("run", "--method", "full", "--near", "8MiB", "--max-new-tokens", "4", QUESTION, text=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4821\n"
    assert "receipt: full" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_profile_writes_a_file_that_run_takes(file: str, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    done = farkv("profile", "--prompts", file, "--out", str(out), "--tokens", "128", "--limit", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == out.stat().st_size
    again = farkv("run", "--profile", str(out), "--file", file, "--max-new-tokens", "4", "--json", QUESTION)
    assert json.loads(again.stdout)["answer"] == "4821"


def test_the_demo_finds_its_fact() -> None:
    done = farkv("demo", "--tokens", "1200", "--facts", "8", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answer"]
    assert f"expected: {answer}" in done.stderr
