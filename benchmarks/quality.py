"""How good is a choice of records? One-question recall and decode-mode KL, every method on the same prompts.

    python benchmarks/quality.py --out benchmarks/results/infinigen_quality.jsonl
    python benchmarks/quality.py --lengths 2048 --prompts 10 --methods ours,oracle

In: the demo model, held-out standard-library files. Out: a JSON line per prompt and method, a table at the end.
Prefill runs once per prompt; each method's cache is then filled with those very keys, values and queries, so that
methods differ in nothing but what they read at the decode steps (question, then answer), which run for real.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.evals import prefill as shared
from farkv.evals.prefill import Prefilled
from farkv.hf.ask import build_prompt, feed
from farkv.hf.attach import attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import Full, InfiniGen, Method, Oracle, Random, Window

# Of a fact's line, at most, on average.
FACT_TOKENS = 14

METHODS: dict[str, Method] = {
    "ours 0.10": InfiniGen(fraction=0.10),
    "ours 0.05": InfiniGen(fraction=0.05),
    "ours 0.02": InfiniGen(fraction=0.02),
    "ours 0.10, 24 columns": InfiniGen(fraction=0.10, columns=24),
    "ours 0.05, 24 columns": InfiniGen(fraction=0.05, columns=24),
    "ours 0.10, 8-bit index": InfiniGen(fraction=0.10, index_bits=8),
    "far 0.10": InfiniGen(fraction=0.10),
    "far 0.05": InfiniGen(fraction=0.05),
    "far, no top-up, post_attn 0.10": InfiniGen(fraction=0.10, top_up=0.0),
    "far, no top-up, attn 0.10": InfiniGen(fraction=0.10, top_up=0.0, source="attn"),
    "paper 0.20": InfiniGen(fraction=0.20, paper=True),
    "paper, post_attn 0.20": InfiniGen(fraction=0.20, paper=True, source="post_attn"),
    "paper 0.30 (0.20 a layer)": InfiniGen(fraction=0.30, paper=True),
    "oracle 0.10": Oracle(fraction=0.10),
    "window 0.10": Window(fraction=0.10),
    "random 0.10": Random(fraction=0.10),
}
UNPROFILED = {"ours 0.10, no profile": InfiniGen(fraction=0.10)}


def prefill_once(model: Any, tokens: list[int]) -> Prefilled:
    """Run the text densely, in one pass, and keep what each layer saw."""
    return shared.prefill_once(model, tokens, chunk=len(tokens))


def fill_cache(far: Handle, prefilled: Prefilled, verify: int = 0) -> FarCache:
    """Make a cache that holds a prefilled text, as if this method had read it."""
    return shared.fill_cache(far, prefilled, extra_tokens=256, verify=verify)


@torch.no_grad()
def answer_greedily(far: Handle, cache: FarCache, question: list[int], n_new: int) -> list[int]:
    """Feed the question token by token and decode greedily."""
    logits = feed(far, cache, question)
    assert logits is not None
    out: list[int] = []
    for _ in range(n_new):
        out.append(int(logits.argmax(-1)))
        if len(out) < n_new:
            logits = feed(far, cache, out[-1:])
            assert logits is not None
    return out


@torch.no_grad()
def force_tokens(far: Handle, cache: FarCache, tokens: list[int]) -> torch.Tensor:
    """Feed known tokens as decode steps; return the log-probabilities after each, [n, vocabulary]."""
    rows = []
    for token in tokens:
        logits = feed(far, cache, [token])
        assert logits is not None
        rows.append(logits.float().log_softmax(-1))
    return torch.cat(rows)


class Bench:
    """One run over lengths and prompts; writes a line per prompt and method."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        quiet_libraries()
        self.model, self.tokenizer = load_model("demo", device="cpu")
        self.sources = read_sources(STDLIB, held_out=True)
        wanted = [m.strip() for m in args.methods.split(",")] if args.methods else None
        every = {**METHODS, **UNPROFILED}
        self.methods = {n: m for n, m in every.items() if wanted is None or any(n.startswith(w) for w in wanted)}
        self.out = Path(args.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text("")

    def count(self, line: str) -> int:
        """Count the tokens of a line; the demo tokenizer never joins lines."""
        return len(self.tokenizer(line)["input_ids"])

    def write(self, row: dict[str, Any]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def attach(self, name: str) -> Handle:
        # A near limit, however large, makes near memory a tier of its own: records are then chosen one layer ahead.
        near = "1GiB" if name.startswith("far") else None
        return attach(self.model, self.methods[name], near=near, profile=False if name in UNPROFILED else None)

    def run_recall(self, length: int, n_facts: int, seed: int) -> None:
        """Ask one question of one text, of every method."""
        filler = draw_filler(self.sources, length - FACT_TOKENS * n_facts - 20, seed, self.count)
        made = make_recall_prompt(filler, n_facts, seed)
        prompt = build_prompt(self.tokenizer, made.text, made.question)
        prefilled = prefill_once(self.model, prompt.text)
        with attach(self.model, Full()) as far:
            full = answer_greedily(far, fill_cache(far, prefilled), prompt.question, 4)
        expected = self.tokenizer(made.answer)["input_ids"]
        sha = hashlib.sha256((made.text + made.question).encode()).hexdigest()[:16]
        for name in self.methods:
            with self.attach(name) as far:
                cache = fill_cache(far, prefilled)
                answer = answer_greedily(far, cache, prompt.question, 4)
                receipt = far.receipt(cache)
            self.write(
                dict(task="recall", method=name, length=length, tokens=prompt.n_tokens, facts=n_facts, seed=seed,
                     prompt_sha=sha, right=answer == expected, full_right=full == expected, agrees=answer == full,
                     read_fraction=receipt.read_fraction, index_fraction=receipt.index_fraction)
            )  # fmt: skip

    def run_code(self, length: int, n_steps: int, seed: int) -> None:
        """Decode known code token by token: KL of every method's prediction to the full cache's."""
        text = "".join(draw_filler(self.sources, length + n_steps + 100, seed, self.count))
        tokens = self.tokenizer(text)["input_ids"][: length + n_steps]
        prefilled = prefill_once(self.model, tokens[:length])
        with attach(self.model, Full()) as far:
            full = force_tokens(far, fill_cache(far, prefilled), tokens[length:])
        for name in self.methods:
            with self.attach(name) as far:
                cache = fill_cache(far, prefilled)
                logs = force_tokens(far, cache, tokens[length:])
                receipt = far.receipt(cache)
            kl = (full.exp() * (full - logs)).sum(-1)
            self.write(
                dict(task="code", method=name, length=length, seed=seed, kl=float(kl.mean()),
                     agrees=float((full.argmax(-1) == logs.argmax(-1)).float().mean()),
                     read_fraction=receipt.read_fraction, index_fraction=receipt.index_fraction)
            )  # fmt: skip

    def run(self) -> None:
        """Run all lengths; prompts of one length differ in everything."""
        facts = {1024: 10, 2048: 20, 4096: 30, 8192: 40}
        started = time.time()
        for length, n_prompts in zip(self.args.lengths, self.args.prompts, strict=True):
            for seed in range(n_prompts):
                self.run_recall(length, facts.get(length, 20), 1_000_000 + 1000 * length + seed)
                sys.stderr.write(f"\rrecall {length}: {seed + 1}/{n_prompts}, {time.time() - started:.0f} s ")
            for seed in range(self.args.texts):
                self.run_code(length, 48, 2_000_000 + 1000 * length + seed)
                sys.stderr.write(f"\rcode {length}: {seed + 1}/{self.args.texts}, {time.time() - started:.0f} s   ")
        sys.stderr.write("\n")
        print(format_table(self.out))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def format_table(path: Path, methods: tuple[str, ...] = ()) -> str:
    """Return one Markdown row per method (all, or those named): agreement and accuracy on recall, KL on code."""
    rows = [r for r in read_rows(path) if not methods or r["method"] in methods]
    lengths = sorted({r["length"] for r in rows})
    names = ["method", "read", "index", "agrees", "agrees, full right"]
    names += [f"agrees {n // 1024} K" for n in lengths] + ["right", "KL on code"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        recall = [r for r in mine if r["task"] == "recall"]
        cells = [method, *(f"{mean(r[name] for r in mine):.3f}" for name in ("read_fraction", "index_fraction"))]
        cells += [percent(r["agrees"] for r in recall), percent(r["agrees"] for r in recall if r["full_right"])]
        cells += [percent(r["agrees"] for r in recall if r["length"] == n) for n in lengths]
        cells += [percent(r["right"] for r in recall)]
        cells += [f"{mean(r['kl'] for r in mine if r['task'] == 'code'):.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    full = {(r["length"], r["seed"]): r["full_right"] for r in rows if r["task"] == "recall"}
    lines += ["", f"{len(full)} recall prompts; the full cache itself is right on {percent(full.values())} of them."]
    return "\n".join(lines)


def format_headline(path: Path) -> str:
    """Return the one sentence of the README."""
    rows = [r for r in read_rows(path) if r["method"] == "ours 0.10" and r["task"] == "recall"]
    longest = max(r["length"] for r in rows) // 1024
    read, index = (100 * mean(r[name] for r in rows) for name in ("read_fraction", "index_fraction"))
    agrees, good = percent(r["agrees"] for r in rows), percent(r["agrees"] for r in rows if r["full_right"])
    return (
        f"Measured: reading {read:.0f} % of the KV bytes per step (and an index of {index:.0f} %), the demo model\n"
        f"gives the full cache's answer to {agrees} of {len(rows)} questions about 2 to {longest} K tokens of code,\n"
        f"and to {good} of those that the full cache answers right."
    )


def mean(values: Any) -> float:
    """Return the mean, nan of nothing."""
    values = list(values)
    return statistics.fmean(values) if values else float("nan")


def percent(values: Any) -> str:
    """Return a share as text."""
    values = list(values)
    return f"{100 * mean(values):.1f} %" if values else "–"


def read_numbers(text: str) -> list[int]:
    """Read whole numbers by commas."""
    return [int(n) for n in text.split(",")]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/infinigen_quality.jsonl")
    parser.add_argument("--lengths", default="2048,4096,8192", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--prompts", default="36,36,30", type=read_numbers, help="recall prompts, one number a length")
    parser.add_argument("--texts", default=4, type=int, help="code texts per length, 48 decode steps each")
    parser.add_argument("--methods", default="", help="prefixes of method names, by commas; default all")
    parser.add_argument("--threads", default=2, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Bench(args).run()


if __name__ == "__main__":
    main()
