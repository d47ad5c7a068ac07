"""Ctrl-C: every command ends with 130, with what it has, and says how to go on. A real signal in a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from farkv.bench.stopped import Keep, Stopped
from tests.command import CODE, QUESTION

# A shell lets what it starts in the background ignore Ctrl-C. `after` sends it where a call of a function has ended.
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from importlib import import_module

def after(module, name, n):
    owner = import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.split(".")[-1]
    plain, calls = getattr(owner, name), []
    def stop(*args, **kwargs):
        out = plain(*args, **kwargs)
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return out
    setattr(owner, name, stop)

"""


def stop(place: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets SIGINT at a place."""
    code = f"{START}{place}\nfrom farkv.cli import main\nsys.argv = ['farkv', *{list(arguments)!r}]\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return str(path)


# Of the prompt, then three tokens.
IN_ANSWER = "after('farkv.hf.ask', 'PieceStreamer.put', 4)"
# In the third pass of eight layers, or the second.
IN_READING = "after('farkv.hf.layer', 'FarLayer.update', 20)"


def test_an_answer_is_kept_and_its_receipt(file: str) -> None:
    done = stop(IN_ANSWER, "run", "--file", file, "--max-new-tokens", "9", QUESTION)
    assert done.stdout == "482\n"
    assert "receipt: infinigen" in done.stderr
    assert done.stderr.endswith("farkv: interrupted after 3 tokens of the answer\n")
    assert "was cut after" not in done.stderr


def test_json_is_one_object_of_what_there_is(file: str) -> None:
    done = stop(IN_ANSWER, "run", "--file", file, "--max-new-tokens", "9", "--json", QUESTION)
    receipt = json.loads(done.stdout)
    assert (receipt["answer"], receipt["generated_tokens"], receipt["model"]) == ("482", 3, "demo")
    assert done.stderr == "farkv: interrupted after 3 tokens of the answer\n"


def test_reading_says_how_far_it_came(file: str, tmp_path: Path) -> None:
    session = tmp_path / "code.farkv"
    options = ["--chunk-tokens", "100", "--session", str(session), "--json"]
    done = stop(IN_READING, "run", "--file", file, *options, QUESTION)
    receipt = json.loads(done.stdout)
    read = receipt["context_tokens"]
    assert read > 0
    assert read % 100 == 0, "whole passes"
    assert (receipt["answer"], receipt["generated_tokens"]) == ("", 0)
    assert f"farkv: interrupted while reading, after {read} of " in done.stderr
    assert not session.exists()


def test_a_profile_keeps_its_prompts(file: str, tmp_path: Path) -> None:
    options = ["--prompts", file, "--tokens", "64", "--limit", "4", "--out", str(tmp_path / "p")]
    done = stop("after('farkv.measure.profile', 'run_mini', 3)", "profile", *options)
    assert "interrupted while measuring: 2 of 4 prompts are kept in" in done.stderr
    assert "the same command goes on from there" in done.stderr
    assert (tmp_path / "p.part").is_file()
    assert not (tmp_path / "p").exists()


def test_an_evaluation_keeps_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "eval"
    options = [
        "--tasks", "niah_single", "--methods", "window", "--fractions", "0.1", "--lengths", "256", "--limit", "3",
        "--trace", "0", "--threads", "1", "--out", str(out), "--json",
    ]  # fmt: skip
    done = stop("after('farkv.evals.run', 'Runner._write', 2)", "eval", *options)
    told = json.loads(done.stdout)
    assert (told["rows"], told["written"]) == (2, 2)
    assert f"interrupted with 2 rows in {out}; go on: farkv eval --out {out} --resume" in done.stderr
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_a_benchmark_prints_the_contexts_that_were_finished() -> None:
    options = ["--contexts", "128,256", "--layers", "1", "--rounds", "1", "--methods", "matmul-bf16", "--json"]
    done = stop("after('farkv.bench.decode', 'measure_context', 1)", "bench", "decode", *options)
    # The signal came when the first was measured and not yet kept, or right after: a list of it or none.
    assert "farkv: interrupted" in done.stderr
    done = stop("after('farkv.bench.timing', 'run_round', 5)", "bench", "decode", *options)
    assert [row["context"] for row in json.loads(done.stdout)["rows"]] == [128]
    assert "before the end: the table has what was finished" in done.stderr


def test_what_was_finished_is_given_with_the_interruption() -> None:
    kept: list[int] = []
    with pytest.raises(KeyboardInterrupt), Keep(kept):
        raise KeyboardInterrupt
    with Keep(kept) as keep:
        kept.append(1)
        raise KeyboardInterrupt
    with pytest.raises(Stopped) as stopped:
        keep.give(kept)
    assert stopped.value.report == [1]
    with Keep(kept) as keep:
        pass
    assert keep.give(kept) is kept
    with pytest.raises(ValueError, match="other"), Keep(kept):
        raise ValueError("other")
