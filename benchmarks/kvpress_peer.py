"""The prompts of a `farkv eval`, answered with NVIDIA's kvpress: another library's eviction beside farkv's methods.

    benchmarks/kvpress_peer.sh DIR                       # makes the environment, then runs this
    benchmarks/kvpress_peer.sh DIR --presses snapkv,knorm --fractions 0.05,0.1 --limit 5

In: DIR/prompts.jsonl (with the tokens that farkv feeds, whatever the form), DIR/results.jsonl (what the full cache
answered or wrote), DIR/run.json (model, dtype, form, fractions). Out: DIR/results-kvpress.jsonl, rows of the same form;
a row that is there already is not made again.

The text is read without the question, as farkv reads it; a press then evicts, compression_ratio = 1 - fraction of the
text's records; questions and right answers are fed token by token and stay whole. KL and top-1 are to the uncompressed
cache of this program, at the same tokens; own answers are given on a copy. What is read per step is what the
cache's tensors hold, counted from their shapes: a little more than the fraction. A press that only masks (kvzip) keeps
its tensors whole; its rows say read_fraction 1 and `unproven`. It runs only where --presses names it, and so does
observedattention (H2O's score), which needs all attention weights: at 8 K tokens it takes ten times the other presses'
time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from farkv.evals.score import SCORES

SOURCE = Path(__file__).parent.parent / "src" / "farkv"
RESULTS = "results-kvpress.jsonl"
DEFAULT = "snapkv,pyramidkv,streamingllm,expectedattention,knorm,tova,keydiff"


class Told(NamedTuple):
    """What one press's cache answered; fractions are of the bytes of a full cache, means over decode steps.

    score, nll: of a continuation, or of what was written.  kl, top1, agrees: to the full cache of the same program.
    turns: kl and top1 of every turn.
    """

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
    top1: float | None = None
    agrees: bool | None = None
    turns: tuple[dict[str, Any], ...] = ()


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


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of a run; exit in words where it saved none, or none with their tokens."""
    prompts = read_lines(path)
    if not prompts:
        sys.exit(
            f"{path}: expected prompts, got none; run the same farkv eval with --save-prompts, no row is made anew"
        )
    if any("tokens" not in prompt for prompt in prompts):
        sys.exit(
            f"{path}: expected prompts with their tokens, got an older farkv's, whose rows were measured otherwise; "
            "run farkv eval with --save-prompts into another folder"
        )
    return prompts


def find_asked(
    prompts: Iterable[dict[str, Any]], full: dict[str, dict[str, Any]], limit: int | None
) -> list[dict[str, Any]]:
    """Return the prompts that the full cache answered, at most `limit` per task and length."""
    counts: Counter[tuple[str, int]] = Counter()
    asked = []
    for prompt in prompts:
        cell = (prompt["task"], prompt["length"])
        row = full.get(prompt["prompt_sha"])
        if row is None or (limit is not None and counts[cell] >= limit):
            continue
        counts[cell] += 1
        asked.append(take_written(prompt, row))
    return asked


def take_written(prompt: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with what farkv's full cache wrote, where there is no right answer."""
    if not prompt["n_written"]:
        return prompt
    (turn,) = prompt["tokens"]["turns"]
    tokens = {**prompt["tokens"], "turns": [{**turn, "answer": full["turns"][0]["written"]}]}
    return {**prompt, "tokens": tokens}


def describe_turns(prompt: dict[str, Any], told: Told) -> list[dict[str, Any]]:
    """Return the turns' records as farkv's rows have them; of what was written in place of an answer, the tokens."""
    records: list[dict[str, Any]] = []
    if prompt["continuation"]:
        return records
    fed = [turn["answer"] for turn in prompt["tokens"]["turns"]]
    for said, turn, written, near in zip(told.answers, prompt["turns"], fed, told.turns, strict=True):
        expected = list(turn["expected"])
        if turn["score"] == "none":
            records.append({"answer": said, "expected": [], "score": 0.0, "written": written, **near})
        else:
            score = SCORES[turn["score"]](said, tuple(expected))
            records.append({"answer": said, "expected": expected, "score": score, **near})
    return records


def make_row(prompt: dict[str, Any], full: dict[str, Any], told: Told) -> dict[str, Any]:
    """Return a row of `results.jsonl`'s form.

    Args:
        prompt: a line of prompts.jsonl.
        full: the full cache's row of the same prompt.
        told: what the press's cache answered.
    """
    turns = describe_turns(prompt, told)
    score = told.score if told.score is not None else sum(t["score"] for t in turns) / len(turns)
    return {
        "task": prompt["task"], "method": f"kvpress:{told.press}", "fraction": told.fraction,
        "length": prompt["length"], "seed": prompt["seed"], "answer": "\n".join(told.answers),
        "expected": full["expected"], "score": score, "read_fraction": told.read_fraction, "index_fraction": 0.0,
        "resident_fraction": told.last_fraction, "kept_fraction": told.last_fraction,
        "prompt_sha": prompt["prompt_sha"], "gated": full["gated"], "tokens": full["tokens"], "steps": told.steps,
        "agrees": told.agrees, "kl": told.kl, "nll": told.nll, "depth": full["depth"],
        "turns": turns, "proof": "sparse" if told.smaller else "unproven", "bytes_per_step": told.bytes_per_step,
        "full_bytes_per_step": told.full_bytes_per_step, "decode_s": told.seconds,
        "tokens_per_s": told.steps / told.seconds, "query_aware": False, "top1": told.top1,
    }  # fmt: skip


class Peer:
    """One run: what to ask, whom, what is there already."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.dir / RESULTS
        self.settings = run = json.loads((args.dir / "run.json").read_text("utf-8"))
        name = args.model or run["model"]
        self.model_path = str(SOURCE / "demo" / "model") if name == "demo" else name
        self.presses = args.presses.split(",")
        self.fractions = [f for f in args.fractions or run["fractions"] if f < 1]
        rows = read_lines(args.dir / "results.jsonl")
        self.full = {row["prompt_sha"]: row for row in rows if row["method"] == "full"}
        self.asked = find_asked(read_prompts(args.dir / "prompts.jsonl"), self.full, args.limit)
        self.done = {name_row(row) for row in read_lines(self.out)}
        self.same = self.n_full = 0

    def find_missing(self, prompt: dict[str, Any]) -> list[tuple[str, float]]:
        """Return which presses at which fractions have not answered a prompt yet."""
        wanted = [(press, fraction) for press in self.presses for fraction in self.fractions]
        key = (prompt["length"], prompt["seed"], prompt["prompt_sha"])
        return [(p, f) for p, f in wanted if (prompt["task"], f"kvpress:{p}", f, *key) not in self.done]

    def run(self) -> None:
        """Answer what is missing, prompt by prompt."""
        import torch
        from kvpress_answer import Answerer, compare_logits, compare_presses

        torch.set_num_threads(self.args.threads)
        dtype = getattr(torch, self.settings["dtype"])
        answerer = Answerer(self.model_path, dtype, self.settings["form"], self.args.eager_tokens)
        if self.settings["batch"] > 1:
            say("run.json: texts were answered in batches, filled up with line ends; here each is read as it is")
        if self.asked:
            text = self.asked[0]["tokens"]["text"]
            if self.args.reference:
                say(compare_logits(self.args.reference, self.model_path, text, answerer))
            say(compare_presses(answerer, text, self.presses, self.fractions[0]))
        for n, prompt in enumerate(self.asked, 1):
            missing, started = self.find_missing(prompt), time.perf_counter()
            if not missing:
                continue
            n_rows, beside = self.answer(answerer, prompt, missing)
            took = time.perf_counter() - started
            say(f"[{n}/{len(self.asked)}] {prompt['task']} {prompt['length']} seed {prompt['seed']}: "
                f"{n_rows} rows, {took:.1f} s; {beside}")  # fmt: skip

    def answer(self, answerer: Any, prompt: dict[str, Any], missing: list[tuple[str, float]]) -> tuple[int, str]:
        """Write a prompt's missing rows; return how many, and how the full cache here compares with farkv's."""
        row, n_rows, beside = self.full[prompt["prompt_sha"]], 0, ""
        for told in answerer.answer(prompt, missing):
            if told.press == "full":
                beside = self.compare_full(prompt, row, told)
                continue
            made = make_row(prompt, row, told)
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
            n_rows += 1
        return n_rows, beside

    def compare_full(self, prompt: dict[str, Any], row: dict[str, Any], told: Told) -> str:
        """Say whether this program without eviction says what farkv's full cache says."""
        if prompt["continuation"]:
            return f"full cache: nll {told.nll:.4f}, farkv's {row['nll']:.4f}"
        if prompt["n_written"]:
            return "fed what farkv's full cache wrote"
        self.n_full += 1
        self.same += "\n".join(told.answers) == row["answer"]
        return f"full cache as farkv's: {self.same} of {self.n_full}"


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
