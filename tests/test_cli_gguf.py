"""A GGUF file on the command line, in every command that takes a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import farkv
from tests.gguf_files import write_gguf

TEXT = "the man in the tan van ran\n" * 30


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return "tiny.gguf"


def test_run_says_once_what_was_dequantised(model: str) -> None:
    done = farkv("run", "-m", model, "-f", "text.txt", "--json", "--max-new-tokens", "3", "who?")
    assert done.returncode == 0, done.stderr
    line, context = done.stderr.splitlines()
    assert "the model was made for 512" in context
    assert line.startswith("tiny.gguf: Q8_0, F32 weights, dequantised by transformers into float32: ")
    weights = {"dtype": "float32", "source": "Q8_0, F32 of tiny.gguf, dequantised by transformers"}
    assert json.loads(done.stdout)["weights"] == weights
    half = farkv("run", "-m", model, "-f", "text.txt", "--dtype", "bfloat16", "--max-new-tokens", "3", "who?")
    assert half.returncode == 0, half.stderr
    assert "weights: bfloat16, from Q8_0, F32 of tiny.gguf," in half.stderr
    assert max(map(len, half.stderr.splitlines()[2:])) <= 80


def test_a_profile_and_a_plan_lie_beside_the_file(model: str) -> None:
    asked = farkv("plan", "-m", model, "--ratio", "0.3")
    assert asked.returncode == 2
    assert "farkv profile --model tiny.gguf --out tiny.profile.safetensors" in asked.stderr
    done = farkv("profile", "-m", model, "-p", "text.txt", "--tokens", "128", "--out", "tiny.profile.safetensors")
    assert done.returncode == 0, done.stderr
    done = farkv("plan", "-m", model, "--ratio", "0.3", "--json")
    assert done.returncode == 0, done.stderr
    done = farkv("run", "-m", model, "-f", "text.txt", "--plan", "plan.json", "--max-new-tokens", "2", "--json", "who?")
    assert done.returncode == 0, done.stderr
    # Had it no profile, its index would be fitted to the prompt.
    assert "skew_from_prompt" not in json.loads(done.stdout)["fallbacks"]


def test_a_session_of_the_file(model: str) -> None:
    for question in ("who?", "where?"):
        text = ("-f", "text.txt") if question == "who?" else ()
        done = farkv("run", "-m", model, *text, "--session", "a.farkv", "--max-new-tokens", "3", "--json", question)
        assert done.returncode == 0, done.stderr


def test_eval(model: str) -> None:
    options = ("--tasks", "ppl", "--lengths", "256", "--limit", "1", "--methods", "window", "--fractions", "0.2")
    done = farkv("eval", "-m", model, *options, "--form", "completion", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2


def test_bench(model: str) -> None:
    for kind in ("prefill", "e2e", "decode"):
        more = () if kind == "prefill" else ("--layers", "3") if kind == "decode" else ("--own-fraction",)
        done = farkv("bench", kind, "-m", model, "--contexts", "128", "--rounds", "1", *more, "--json")
        assert done.returncode == 0, done.stderr
        settings = json.loads(done.stdout)["settings"]
        assert settings["shape"] == "tiny.gguf"
        assert kind == "decode" or settings["dtype"] == "float32"
    for arguments, says in (
        (["e2e", "-m", model, "--layers", "2"], "drop --shape and --layers"),
        (["prefill", "-m", model, "--shape", "llama3-8b"], "drop --shape"),
        (["decode", "-m", model, "--shape", "llama3-8b"], "drop --shape"),
        (["e2e", "--dtype", "auto"], "--dtype: expected"),
        (["e2e", "-m", "none.gguf"], "No such file"),
    ):
        done = farkv("bench", *arguments)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
