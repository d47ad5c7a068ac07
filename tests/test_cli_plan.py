"""`farkv plan` and what `farkv run` makes of it: files in and out, mistakes in one line.

Inside this process, where the libraries are loaded already; the table, whose width counts, is a real process's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.hf.load import load_model
from tests.command import FACTS, QUESTION, run_process
from tests.command import farkv as command

CODE = FACTS + "import os\n\n\ndef f(path):\n    return os.path.join(path, 'x')\n" * 12


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Measure a small profile of the demo model: it does not depend on the one in the package."""
    model, tokenizer = load_model("demo", device="cpu")
    texts = [CODE[i * 40 :] + QUESTION for i in range(3)]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    farkv.profile(model, rows).save(path)
    return str(path)


@pytest.fixture(scope="module")
def plan(profile: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make(profile, "--ratio", "0.5", "-o", str(path))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return str(path)


def make(profile: str, *arguments: str) -> dict[str, Any]:
    done = command("plan", "--profile", profile, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(*arguments: str) -> dict[str, Any]:
    done = command("run", "--model", "demo", "--max-new-tokens", "4", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_is_one_object_and_the_file_is_the_plan(profile: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    said = make(profile, "--ratio", "0.3", "-o", str(out))
    plan = farkv.Plan.load(out)
    assert said == {"out": str(out), **json.loads(json.dumps(plan.to_dict()))}
    assert list(plan.levers) == ["keep", "near", "fetch"]
    assert plan.get("keep").ratio == pytest.approx(0.3, abs=1e-3)


def test_a_table_of_80_columns_a_figure_and_kvpress_ratios(profile: str, tmp_path: Path) -> None:
    out, plot, ratios = tmp_path / "plan.json", tmp_path / "plan.png", tmp_path / "kvpress.json"
    drawn = ("--plot", str(plot), "--kvpress", str(ratios))
    done = run_process("plan", "--profile", profile, "--ratio", "0.3", "-o", str(out), *drawn)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    table = done.stderr.split("wrote")[0]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("keep: xkv, ratio 0.3", "near: xkv", "fetch: xkv", "mean", "equal holds"):
        assert word in table
    assert plot.read_bytes().startswith(b"\x89PNG")
    plan = farkv.Plan.load(out)
    removed = json.loads(ratios.read_text())["compression_ratios"]
    assert removed == plan.to_kvpress()
    assert all(0 <= share <= 1 for share in removed)


def test_without_a_budget_one_is_proposed_and_written(profile: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    said = make(profile, "-o", str(out))
    plan, proposal = farkv.Plan.load(out), said["proposal"]
    assert said == {"out": str(out), "proposal": proposal, **json.loads(json.dumps(plan.to_dict()))}
    held = {c["ratio"]: c["held"] for c in proposal["candidates"]}
    for lever, ratio in proposal["ratios"].items():
        assert plan.get(lever).ratio == pytest.approx(ratio, abs=1e-3)
        # It holds enough, and the next smaller candidate does not.
        assert held[ratio][lever] >= proposal["holds"] == 0.9
        smaller = [r for r in held if r < ratio]
        assert not smaller or held[max(smaller)][lever] < 0.9
    done = run_process("plan", "--profile", profile, "-o", str(out), "--lever", "fetch")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stderr.split("wrote")[0].splitlines())) <= 80
    for word in ("no budget was given", "fetch", "proposed for", "holds 90% of the mass"):
        assert word in " ".join(done.stderr.split())
    assert list(farkv.Plan.load(out).levers) == ["fetch"]


def test_a_base_gives_what_is_not_made_anew(profile: str, plan: str, tmp_path: Path) -> None:
    out = str(tmp_path / "both.json")
    make(profile, "--ratio", "0.1", "--lever", "fetch", "--base", plan, "-o", out)
    both, base = farkv.Plan.load(out), farkv.Plan.load(plan)
    assert both.get("keep") == base.get("keep")
    assert both.get("fetch").ratio == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    "budget", [("--tokens", "200"), ("--bytes", "64KiB"), ("--retention", "0.8", "--confidence", "0"), ("--ratio", "1")]
)
def test_every_budget(profile: str, budget: tuple[str, ...], tmp_path: Path) -> None:
    said = make(profile, *budget, "-o", str(tmp_path / "p.json"), "--rule", "xkv", "--lever", "keep")
    assert list(said["levers"]) == ["keep"]
    assert said["levers"]["keep"]["budget"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0.3", "--tokens", "9"], "tokens and ratio"),
        (["--ratio", "2"], "(0, 1]"),
        (["--ratio", "0.3", "--lever", "fly"], "--lever"),
        (["--ratio", "0.3", "--rule", "magic"], "--rule"),
        (["--bytes", "3 lots"], "byte size"),
        (["--ratio", "0.3", "--lever", "fetch", "--kvpress", "x.json"], "--kvpress"),
        (["--ratio", "0.3", "--base", "/no/such/plan"], "cannot be read"),
        (["--ratio", "0.3", "--profile", "/no/such/profile"], "cannot be read"),
        (["--ratio", "0.3", "--model", "/no/such/model"], "farkv profile"),
        (["--ratio", "0.3", "-o", "/no/such/folder/plan.json"], "cannot be written"),
        (["--retention", "0.8"], "confidence"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(profile: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    given = [] if {"--profile", "--model"} & set(arguments) else ["--profile", profile]
    out = [] if "-o" in arguments else ["-o", str(tmp_path / "plan.json")]
    done = command("plan", *given, *out, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "plan.json").exists()


def test_xkv_that_read_the_question_answers_it(file: str) -> None:
    receipt = run("--method", "xkv", "--fraction", "0.5", "--query-aware", "--file", file, QUESTION)
    assert receipt["answer"] == "4821"
    assert receipt["method"] == "xkv"
    assert 0.4 < receipt["kept_fraction"] <= 0.5
    assert receipt["evicted_records"] > 0


def test_a_plan_drives_run(file: str, profile: str, plan: str) -> None:
    kept = run("--method", "xkv", "--plan", plan, "--query-aware", "--file", file, QUESTION)
    assert kept["kept_fraction"] <= farkv.Plan.load(plan).get("keep").ratio
    common = ("--plan", plan, "--profile", profile, "--near", "4MiB", "--file", file)
    fetched = run(*common, QUESTION)
    assert fetched["method"] == "infinigen+xkv(fetch)"
    assert fetched["kept_fraction"] == 1.0
    assert fetched["read_fraction"] <= 0.5
    held = run(*common, "--lever", "near", "--lever", "fetch", QUESTION)
    assert held["method"] == "infinigen+xkv(near,fetch)"
    assert held["answer"] == fetched["answer"] == "4821"
    # What is read and held need not cross the link; without the lever a recently used set may spare even more.
    read_bytes = held["read_fraction"] * held["kv_bytes"]["total"]
    assert 0 < held["fetched_bytes_per_token"] < read_bytes
    assert 0 < fetched["fetched_bytes_per_token"] < read_bytes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lever", "near"], "add --plan"),
        (["--retention", "0.8"], "--retention"),
        (["--method", "xkv", "--retention", "2"], "(0, 1]"),
        (["--method", "xkv", "--retention", "0.5", "--fraction", "0.5"], "fraction and retention"),
        (["--method", "xkv", "--plan", "/no/such/plan"], "cannot be read"),
        (["--plan", "x", "--lever", "fly"], "--lever"),
    ],
)
def test_a_mistake_of_run_is_one_line(file: str, arguments: list[str], says: str) -> None:
    done = command("run", "--file", file, *arguments, QUESTION)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_demos_own_profile_makes_plans(tmp_path: Path) -> None:
    done = command("plan", "--ratio", "0.3", "-o", str(tmp_path / "plan.json"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["levers"].keys() == {"keep", "near", "fetch"}
