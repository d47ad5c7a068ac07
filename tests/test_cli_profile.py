"""`farkv profile` as a user meets it: files in, one profile out, mistakes in one line, interruptions survived.

Inside this process, where the libraries are loaded already; tests/test_cli.py starts the command for real.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from farkv.calibrate.profile import Profile
from farkv.measure import profile as hf_measure
from tests.command import CODE, QUESTION, Done, farkv


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def asked(tmp_path: Path) -> str:
    rows = [{"prompt": CODE + QUESTION}, {"text": CODE.rstrip("\n"), "question": QUESTION}]
    return write_jsonl(tmp_path / "asked.jsonl", rows)


def run(*arguments: str) -> Done:
    return farkv("profile", *arguments)


def measure(*arguments: str) -> dict[str, Any]:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_prompts_of_a_jsonl_file_are_used_whole(asked: str, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    said = measure("-p", asked, "-o", str(out), "--tokens", "16", "--scorer", "value")
    curves = Profile.load(out).curves()
    assert (said["prompts"], said["curves"], said["skew"]) == (2, 2, True)
    assert said["bytes"] == out.stat().st_size
    assert said["tensors"] == 32
    # A text and its question are one prompt, with a newline between: the same tokens as the first line's.
    assert curves.tokens.tolist() == [said["tokens"] // 2] * 2
    assert curves.keep[0].equal(curves.keep[1])
    assert curves.settings == {"scorer": "value", "window": 8, "pool": 7, "token_bytes": [512] * 8}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["asked.jsonl", "p.safetensors"]


def test_runs_of_a_text_are_drawn_by_seed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(CODE * 3)
    common = ("-p", str(tmp_path / "a.py"), "--tokens", "100", "--limit", "4")
    curves = []
    for seed in ("0", "1", "0"):
        said = measure(*common, "--seed", seed, "-o", str(tmp_path / "p"))
        assert (said["prompts"], said["tokens"], said["curves"]) == (4, 400, 4)
        curves.append(Profile.load(tmp_path / "p").curves().keep)
    assert curves[0].equal(curves[2])
    assert not curves[0].equal(curves[1])


def test_light_has_no_skew_and_says_so(asked: str, tmp_path: Path) -> None:
    out = str(tmp_path / "p.safetensors")
    said = measure("-p", asked, "-o", out, "--light")
    assert (said["skew"], said["tensors"], said["curves"]) == (False, 0, 2)
    assert "no skew" in run("-p", asked, "-o", out, "--light").stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ', "not JSON"),
        ('["a"]', "expected an object"),
        ('{"text": "a"}', "'question' is missing"),
        ('{"question": "a"}', "'text' is missing"),
        ('{"prompt": 3}', "'prompt' is 3"),
        ('{"prompt": ""}', "'prompt' is empty"),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + "\n")
    done = run("-p", str(path), "-o", str(tmp_path / "p"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}:3: " in done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "got none"),
        (["-p", "/no/such/file"], "cannot be read"),
        (["-p", __file__, "--scorer", "magic"], "expected one of window"),
        (["-p", __file__, "--out", "/no/such/folder/p"], "create it first"),
    ],
)
def test_other_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": CODE[i:] + QUESTION} for i in range(4)])
    out, part = tmp_path / "p.safetensors", tmp_path / "p.safetensors.part"
    whole = measure("-p", asked, "-o", str(tmp_path / "whole"))
    run_mini, calls = hf_measure.run_mini, []

    def interrupt(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_mini(*arguments)

    monkeypatch.setattr(hf_measure, "run_mini", interrupt)
    assert run("-p", asked, "-o", str(out)).returncode != 0
    assert part.exists()
    assert not out.exists()
    other = run("-p", asked, "-o", str(out), "--limit", "3")
    assert other.returncode == 2
    assert "delete it" in other.stderr
    done = run("-p", asked, "-o", str(out), "--json")
    assert f"resuming from {part}: 2 of 4 prompts are done" in done.stderr
    assert json.loads(done.stdout)["curves"] == whole["curves"] == 4
    assert len(calls) == 5
    resumed, plain = load_file(out), load_file(tmp_path / "whole")
    assert resumed.keys() == plain.keys()
    assert all(resumed[name].equal(plain[name]) for name in plain)
    assert not part.exists()
