"""What `benchmarks/kvpress_peer.py` does without kvpress: which prompts, which rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from farkv.evals.row import Row

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
from kvpress_peer import Peer, Told, find_asked, load_scores, make_row, parse_args, read_lines  # noqa: E402

TOLD = Told("knorm", 0.1, [" 4821", "no"], 0.104, 0.11, 104.0, 1000.0, smaller=True, steps=9, seconds=3.0)


def make_prompt(seed: int, task: str = "multiturn") -> dict[str, Any]:
    turn = {"completion": "print(x)  # ", "answer": "4821", "expected": ["4821"], "score": "all"}
    return {"prompt_sha": f"s{seed}", "task": task, "length": 2048, "seed": seed, "text": "x", "turns": [turn, turn]}


def make_full(seed: int, *, gated: bool = False) -> dict[str, Any]:
    return {"prompt_sha": f"s{seed}", "method": "full", "gated": gated, "answer": " 4821\nno", "expected": ["4821"] * 2,
            "tokens": 2000, "depth": 0.5}  # fmt: skip


def test_a_row_is_one_of_farkv_eval() -> None:
    row = Row(**make_row(make_prompt(3), make_full(3), TOLD, load_scores()))
    assert row.key == ("multiturn", "kvpress:knorm", 0.1, 2048, 3)
    assert (row.score, row.agrees, row.proof, row.read_fraction, row.query_aware) == (0.5, True, "sparse", 0.104, False)
    assert [t["score"] for t in row.turns] == [1.0, 0.0]
    assert row.tokens_per_s == 3.0
    masked = make_row(make_prompt(3), make_full(3), TOLD._replace(smaller=False), load_scores())
    assert masked["proof"] == "unproven"


def test_only_prompts_that_say_something_are_asked() -> None:
    full = {f"s{i}": make_full(i, gated=i == 1) for i in range(5)}
    prompts = [make_prompt(i) for i in range(7)]
    assert [p["seed"] for p in find_asked(prompts, full, None)] == [0, 2, 3, 4]
    assert [p["seed"] for p in find_asked(prompts, full, 2)] == [0, 2]


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": "demo", "fractions": [0.1, 0.2, 1.0]}))
    (tmp_path / "prompts.jsonl").write_text(json.dumps(make_prompt(3)) + "\n")
    (tmp_path / "results.jsonl").write_text(json.dumps(make_full(3)) + "\n")
    row = make_row(make_prompt(3), make_full(3), TOLD, load_scores())
    results = tmp_path / "results-kvpress.jsonl"
    results.write_text(json.dumps(row) + '\n{"cut of')
    peer = Peer(parse_args([str(tmp_path), "--presses", "knorm,snapkv"]))
    assert peer.find_missing(make_prompt(3)) == [("knorm", 0.2), ("snapkv", 0.1), ("snapkv", 0.2)]
    assert read_lines(results) == [row]
