"""What `benchmarks/kvpress_peer.py` does without kvpress: which prompts, which rows, what its full cache answers."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from farkv.evals.describe import EvalPlan
from farkv.evals.row import PROMPTS, RESULTS, Row
from farkv.evals.run import run_eval

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
from kvpress_answer import Answerer  # noqa: E402
from kvpress_peer import SOURCE, Peer, Told, find_asked, make_row, parse_args, read_lines, read_prompts  # noqa: E402

NEAR = ({"kl": 0.5, "top1": 0.5}, {"kl": 0.1, "top1": 1.0})
TOLD = Told("knorm", 0.1, [" 4821", "no"], 0.104, 0.11, 104.0, 1000.0, smaller=True, steps=9, seconds=3.0,
            kl=0.3, top1=0.75, agrees=True, turns=NEAR)  # fmt: skip


def make_prompt(seed: int, task: str = "multiturn", n_written: int = 0) -> dict[str, Any]:
    score = "none" if n_written else "all"
    turn = {"completion": "print(x)  # ", "answer": "4821", "expected": ["4821"], "score": score}
    tokens = {"text": [1], "turns": [{"question": [2], "answer": [3]}] * (1 if n_written else 2), "continuation": []}
    return {"prompt_sha": f"s{seed}", "task": task, "length": 2048, "seed": seed, "text": "x", "continuation": "",
            "n_written": n_written, "turns": [turn] * len(tokens["turns"]), "tokens": tokens}  # fmt: skip


def make_full(seed: int, *, gated: bool = False) -> dict[str, Any]:
    return {"prompt_sha": f"s{seed}", "method": "full", "gated": gated, "answer": " 4821\nno", "expected": ["4821"] * 2,
            "tokens": 2000, "depth": 0.5, "turns": [{"written": [7, 8]}]}  # fmt: skip


def test_a_row_is_one_of_farkv_eval() -> None:
    row = Row(**make_row(make_prompt(3), make_full(3), TOLD))
    assert row.key == ("multiturn", "kvpress:knorm", 0.1, 2048, 3)
    assert (row.score, row.agrees, row.proof, row.read_fraction, row.query_aware) == (0.5, True, "sparse", 0.104, False)
    assert (row.kl, row.top1) == (0.3, 0.75)
    assert [(t["score"], t["kl"], t["top1"]) for t in row.turns] == [(1.0, 0.5, 0.5), (0.0, 0.1, 1.0)]
    assert row.tokens_per_s == 3.0
    masked = make_row(make_prompt(3), make_full(3), TOLD._replace(smaller=False))
    assert masked["proof"] == "unproven"


def test_all_answered_prompts_are_asked_gated_ones_too() -> None:
    full = {f"s{i}": make_full(i, gated=i == 1) for i in range(5)}
    prompts = [make_prompt(i) for i in range(7)]
    assert [p["seed"] for p in find_asked(prompts, full, None)] == [0, 1, 2, 3, 4]
    assert [p["seed"] for p in find_asked(prompts, full, 2)] == [0, 1]


def test_where_there_is_no_right_answer_the_full_caches_is_fed() -> None:
    (prompt,) = find_asked([make_prompt(0, "longgen", 2)], {"s0": make_full(0)}, None)
    assert prompt["tokens"]["turns"] == [{"question": [2], "answer": [7, 8]}]
    told = TOLD._replace(answers=["so"], turns=NEAR[:1], score=0.75)
    row = Row(**make_row(prompt, make_full(0), told))
    assert (row.score, row.turns[0]["written"], row.turns[0]["expected"]) == (0.75, [7, 8], [])


def test_prompts_without_tokens_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / PROMPTS
    with pytest.raises(SystemExit, match="expected prompts, got none; run the same farkv eval with --save-prompts"):
        read_prompts(path)
    old = {k: v for k, v in make_prompt(1).items() if k != "tokens"}
    path.write_text(json.dumps(make_prompt(0)) + "\n" + json.dumps(old) + "\n")
    with pytest.raises(SystemExit, match="expected prompts with their tokens, got an older farkv's"):
        read_prompts(path)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": "demo", "fractions": [0.1, 0.2, 1.0]}))
    (tmp_path / PROMPTS).write_text(json.dumps(make_prompt(3)) + "\n")
    (tmp_path / RESULTS).write_text(json.dumps(make_full(3)) + "\n")
    row = make_row(make_prompt(3), make_full(3), TOLD)
    results = tmp_path / "results-kvpress.jsonl"
    results.write_text(json.dumps(row) + '\n{"cut of')
    peer = Peer(parse_args([str(tmp_path), "--presses", "knorm,snapkv"]))
    assert peer.find_missing(make_prompt(3)) == [("knorm", 0.2), ("snapkv", 0.1), ("snapkv", 0.2)]
    assert read_lines(results) == [row]


@cache
def make_answerer() -> Answerer:
    return Answerer(str(SOURCE / "demo" / "model"), torch.float32, "code", 9000)


def test_its_full_cache_answers_and_predicts_as_farkvs(tmp_path: Path) -> None:
    """Turn by turn, what was written, and a continuation; gated or not."""
    plan = EvalPlan("demo", ("cwe", "multiturn", "longgen", "ppl"), ("full",), (1.0,), (512,), limit=1, threads=1,
                    save_prompts=True)  # fmt: skip
    run_eval(plan, tmp_path)
    peer = Peer(parse_args([str(tmp_path)]))
    assert [prompt["task"] for prompt in peer.asked] == list(plan.tasks)
    for prompt in peer.asked:
        full = Row(**peer.full[prompt["prompt_sha"]])
        (told,) = make_answerer().answer(prompt, [])
        row = Row(**make_row(prompt, peer.full[full.prompt_sha], told))
        assert (row.answer, row.score, row.steps) == (full.answer, full.score, full.steps)
        assert row.turns == full.turns
        assert (row.kl, row.top1, row.agrees, row.proof) == (0, 1, True, "unproven")
        assert (row.nll is None) == (full.nll is None)
        if full.nll is not None:
            assert row.nll == pytest.approx(full.nll, abs=1e-4)


def test_what_it_takes_from_farkv_needs_no_transformers() -> None:
    """Its environment has another release."""
    code = "import sys, farkv.evals.forced, farkv.evals.score; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
