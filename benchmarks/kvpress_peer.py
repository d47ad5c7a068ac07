"""The prompts of a `farkv eval`, answered with NVIDIA's kvpress: another library's eviction beside farkv's methods.

    benchmarks/kvpress_peer.sh DIR                       # makes the environment, then runs this
    benchmarks/kvpress_peer.sh DIR --presses snapkv,knorm --fractions 0.05,0.1 --limit 5

In: DIR/prompts.jsonl, DIR/results.jsonl (what the full cache answered, which cells are gated), DIR/run.json (model,
fractions). Out: DIR/results-kvpress.jsonl, rows of the same form; a row that is there already is not made again.

The text is read without the question, as farkv reads it; a press then evicts, compression_ratio = 1 - fraction of the
text's records; questions and answers are fed token by token, greedy, and stay whole. What is read per step is what the
cache's tensors hold, counted from their shapes: a little more than the fraction. A press that only masks (kvzip) keeps
its tensors whole; its rows say read_fraction 1 and `unproven`. It runs only where --presses names it, and so does
observedattention (H2O's score), which needs all attention weights: at 8 K tokens it takes ten times the other presses'
time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parent.parent / "src" / "farkv"
RESULTS = "results-kvpress.jsonl"
DEFAULT = "snapkv,pyramidkv,streamingllm,expectedattention,knorm,tova,keydiff"


class Told(NamedTuple):
    """What one press's cache answered; fractions are of the bytes of a full cache, means over decode steps."""

    press: str
    fraction: float
    answers: list[str]
    read_fraction: float
    last_fraction: float
    bytes_per_step: float
    full_bytes_per_step: float
    smaller: bool
    steps: int
    seconds: float
    score: float | None = None
    nll: float | None = None
    kl: float | None = None


def load_scores() -> dict[str, Any]:
    """Return farkv's scores: a file of plain Python, so farkv need not be installed here."""
    spec = importlib.util.spec_from_file_location("farkv_score", SOURCE / "evals" / "score.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SCORES


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return a file's JSON lines; a last line that was cut off by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), "utf-8")
    return [json.loads(line) for line in lines]


def name_row(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes a row the same row."""
    return (row["task"], row["method"], row["fraction"], row["length"], row["seed"], row["prompt_sha"])


def find_asked(
    prompts: Iterable[dict[str, Any]], full: dict[str, dict[str, Any]], limit: int | None
) -> list[dict[str, Any]]:
    """Return the prompts that the full cache answered and that are not gated, at most `limit` per task and length."""
    counts: Counter[tuple[str, int]] = Counter()
    asked = []
    for prompt in prompts:
        cell = (prompt["task"], prompt["length"])
        row = full.get(prompt["prompt_sha"])
        if row is None or row["gated"] or (limit is not None and counts[cell] >= limit):
            continue
        counts[cell] += 1
        asked.append(prompt)
    return asked


def make_row(prompt: dict[str, Any], full: dict[str, Any], told: Told, scores: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `results.jsonl`'s form.

    Args:
        prompt: a line of prompts.jsonl.
        full: the full cache's row of the same prompt.
        told: what the press's cache answered.
        scores: by name, `(answer, expected) -> 0 to 1`.
    """
    turns = [
        {"answer": a, "expected": t["expected"], "score": scores[t["score"]](a, tuple(t["expected"]))}
        for a, t in zip(told.answers, prompt["turns"], strict=True)
    ]
    score = told.score if told.score is not None else sum(t["score"] for t in turns) / len(turns)
    answer = "\n".join(told.answers)
    return {
        "task": prompt["task"], "method": f"kvpress:{told.press}", "fraction": told.fraction,
        "length": prompt["length"], "seed": prompt["seed"], "answer": answer, "expected": full["expected"],
        "score": score, "read_fraction": told.read_fraction, "index_fraction": 0.0,
        "resident_fraction": told.last_fraction, "kept_fraction": told.last_fraction,
        "prompt_sha": prompt["prompt_sha"], "gated": full["gated"], "tokens": full["tokens"], "steps": told.steps,
        "agrees": answer == full["answer"] if turns else None, "kl": told.kl, "nll": told.nll, "depth": full["depth"],
        "turns": turns, "proof": "sparse" if told.smaller else "unproven", "bytes_per_step": told.bytes_per_step,
        "full_bytes_per_step": told.full_bytes_per_step, "decode_s": told.seconds,
        "tokens_per_s": told.steps / told.seconds, "query_aware": False,
    }  # fmt: skip


class Peer:
    """One run: what to ask, whom, what is there already."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.dir / RESULTS
        run = json.loads((args.dir / "run.json").read_text("utf-8"))
        name = args.model or run["model"]
        self.model_path = str(SOURCE / "demo" / "model") if name == "demo" else name
        self.presses = args.presses.split(",")
        self.fractions = [f for f in args.fractions or run["fractions"] if f < 1]
        rows = read_lines(args.dir / "results.jsonl")
        self.full = {row["prompt_sha"]: row for row in rows if row["method"] == "full"}
        self.asked = find_asked(read_lines(args.dir / "prompts.jsonl"), self.full, args.limit)
        self.done = {name_row(row) for row in read_lines(self.out)}
        self.scores = load_scores()

    def find_missing(self, prompt: dict[str, Any]) -> list[tuple[str, float]]:
        """Return which presses at which fractions have not answered a prompt yet."""
        wanted = [(press, fraction) for press in self.presses for fraction in self.fractions]
        key = (prompt["length"], prompt["seed"], prompt["prompt_sha"])
        return [(p, f) for p, f in wanted if (prompt["task"], f"kvpress:{p}", f, *key) not in self.done]

    def run(self) -> None:
        """Answer what is missing, prompt by prompt."""
        from kvpress_answer import Answerer, compare_logits, compare_presses

        answerer = Answerer(self.model_path, self.args.threads, self.args.eager_tokens)
        if self.args.reference and self.asked:
            say(compare_logits(self.args.reference, self.model_path, self.asked[0]["text"], answerer))
        if self.asked:
            say(compare_presses(answerer, self.asked[0]["text"], self.presses, self.fractions[0]))
        same = n_full = 0
        for n, prompt in enumerate(self.asked, 1):
            missing, started = self.find_missing(prompt), time.perf_counter()
            if not missing:
                continue
            row, n_rows = self.full[prompt["prompt_sha"]], 0
            for told in answerer.answer(prompt, missing):
                if told.press == "full":
                    # Without eviction this program must say what farkv's full cache says.
                    n_full += 1
                    same += make_row(prompt, row, told, self.scores)["answer"] == row["answer"]
                    continue
                made = make_row(prompt, row, told, self.scores)
                with self.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(made, ensure_ascii=False) + "\n")
                n_rows += 1
            took = time.perf_counter() - started
            say(f"[{n}/{len(self.asked)}] {prompt['task']} {prompt['length']} seed {prompt['seed']}: "
                f"{n_rows} rows, {took:.1f} s; full cache as farkv's: {same} of {n_full}")  # fmt: skip


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="what `farkv eval --out` wrote")
    parser.add_argument("--model", help="folder or hub id; default: the run's own")
    parser.add_argument(
        "--presses", default=DEFAULT, help=f"default: {DEFAULT}; there are observedattention, lagkv, random, kvzip, too"
    )
    parser.add_argument("--fractions", type=lambda s: [float(f) for f in s.split(",")], help="default: the run's own")
    parser.add_argument("--limit", type=int, help="prompts per task and length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--eager-tokens", type=int, default=9000, help="longest text for a press that needs all weights"
    )
    parser.add_argument("--reference", help="an interpreter that has farkv: its model's logits must be the same")
    return parser.parse_args(argv)


if __name__ == "__main__":
    Peer(parse_args()).run()
