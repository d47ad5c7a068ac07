"""The command line: what it prints and how it ends, mostly in this process, for the rest in one of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from farkv import attach
from farkv.demo.explain import explain_run
from farkv.demo.recall import RecallPrompt
from tests.command import CODE, QUESTION, farkv, run_process
from tests.models import generate, make_model, make_prompt


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return str(path)


def test_version_and_help() -> None:
    assert run_process("--version").stdout.startswith("farkv ")
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
        (["--threads", "0", "q"], "--threads: expected 1 to "),
        (["--threads", "100000", "q"], "the processors that farkv may use here, got 100000"),
        (
            ["--top-p", "0.9", "q"],
            "--top-p: limits what is drawn, and temperature 0 takes the likeliest token; give a --te",
        ),
        (["--top-k", "5", "q"], "--top-k: limits what is drawn"),
        (["--top-p", "1.5", "--temperature", "1", "q"], "--top-p: expected a number in (0, 1], got 1.5"),
        (["--exact", "--verify", "2", "q"], "--exact: every token is full attention's"),
        (["--exact", "--method", "xkv", "q"], "--exact: drafts are verified by reading all"),
        (["--system", "be brief", "q"], "has no chat template"),
        (["--file", sys.executable, "q"], "not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = farkv("run", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_process_ends_as_its_main_does(file: str) -> None:
    assert farkv("run", "--no-such-option").returncode == 2
    arguments = ("run", "--file", file, "--near", "10KiB", QUESTION)
    done, process = farkv(*arguments), run_process(*arguments)
    assert (process.returncode, process.stdout, process.stderr) == done
    assert done.returncode == 2


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


def test_exact_gives_the_answer_of_everything(file: str) -> None:
    # A short word more, so that some of the answer is drafted.
    whole = farkv("run", "--file", file, "--method", "full", "--json", "--max-new-tokens", "12", QUESTION)
    done = farkv("run", "--file", file, "--fraction", "0.1", "--exact", "--json", "--max-new-tokens", "12", QUESTION)
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["answer"] == json.loads(whole.stdout)["answer"]
    assert receipt["exact"] == "verified"
    assert receipt["drafts"]["tokens"] == 11
    # A stop string ends it where it would end without drafts.
    stop = receipt["answer"][2]
    asked = ("--fraction", "0.1", "--exact", "--json", "--max-new-tokens", "12", "--stop", stop, QUESTION)
    stopped = json.loads(farkv("run", "--file", file, *asked).stdout)
    assert stop in stopped["answer"]
    assert receipt["answer"].startswith(stopped["answer"])
    assert len(stopped["answer"]) < len(receipt["answer"])
    assert stopped["stop_reason"] == "stop_string"


def test_answer_on_stdout_receipt_on_stderr(file: str) -> None:
    text = Path(file).read_text()
    for start in (farkv, run_process):
        done = start("run", "--method", "full", "--near", "8MiB", "--max-new-tokens", "4", QUESTION, text=text)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "4821\n"
        assert "receipt: full" in done.stderr
        assert max(map(len, done.stderr.splitlines())) <= 80


def test_a_fraction_that_cannot_be_kept_to_is_told_on_stderr(file: str) -> None:
    done = farkv(
        "run", "--file", file, "--method", "xkv", "--fraction", "0.001", "--json", "--max-new-tokens", "2", QUESTION
    )
    receipt = json.loads(done.stdout)
    assert "fraction 0.001 cannot be kept to" in receipt["notes"][0]
    assert "fraction 0.001 cannot be kept to" in " ".join(done.stderr.split())
    assert receipt["read_fraction"] >= receipt["least_read_fraction"] > 0.001
    done = farkv("run", "--file", file, "--method", "full", "--json", "--max-new-tokens", "2", QUESTION)
    assert (json.loads(done.stdout)["exact"], json.loads(done.stdout)["notes"], done.stderr) == ("bit", [], "")


def test_profile_writes_a_file_that_run_takes(file: str, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    done = farkv("profile", "--prompts", file, "--out", str(out), "--tokens", "128", "--limit", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == out.stat().st_size
    again = farkv("run", "--profile", str(out), "--file", file, "--max-new-tokens", "4", "--json", QUESTION)
    assert json.loads(again.stdout)["answer"] == "4821"


def test_the_demo_finds_its_fact_and_says_what_was_shown() -> None:
    done = farkv("demo", "--tokens", "1200", "--facts", "8", "--json")
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert f"expected: {receipt['answer']}" in done.stderr
    # Near memory is far below the cache, so that records travel.
    assert receipt["limits"]["near"] < receipt["kv_bytes"]["total"] / 2
    assert receipt["fetched_bytes_per_token"] > 0
    assert receipt["resident_fraction"] < 1
    said = done.stderr.split("What you have just seen:")[1]
    assert 3 <= len(said.strip().splitlines()) <= 5
    for word in (f"{receipt['context_tokens']:,} tokens", f"{receipt['read_fraction']:.1%}", "is right", "limit of"):
        assert word in said


def test_the_demo_says_what_it_does_before_it_does_it() -> None:
    done = farkv("demo", "--tokens", "400", "--facts", "2", "--near", "8KiB")
    assert done.returncode == 2
    assert [line[:3] for line in done.stderr.splitlines() if line[1:3] == "/3"] == ["1/3", "2/3"]
    assert "near limit" in done.stderr.splitlines()[-1]


def test_an_answer_that_is_wrong_is_called_wrong() -> None:
    model = make_model("llama")
    with attach(model, profile=False) as far:
        generate(model, make_prompt(1, tokens=20), far.new_cache(), n=2)
        receipt = dataclasses.replace(far.receipt(), answer="1234")
    lines = explain_run(RecallPrompt("", "", "4821", "a_b", 6), receipt)
    assert "'1234' is wrong: line 7 says 4821" in " ".join(lines)
    assert "without a limit" in " ".join(lines)
