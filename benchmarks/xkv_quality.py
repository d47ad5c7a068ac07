"""What does a share of the cache hold, and what does it cost? Rules, budgets and levers on the same prompts.

    python benchmarks/xkv_quality.py --out benchmarks/results/xkv_quality.jsonl
    python benchmarks/xkv_quality.py --parts keep --prompts 4

In: the demo model and its shipped profile, fresh held-out prompts. Out: a JSON line per prompt, method and budget.
Parts:
  keep      evict after the prompt. Recall with the question inside the prompt (query-aware, the paper's setting), and
            code, decoded on: attention mass of the *later* decode steps' queries, agreement and KL to the full cache
  agnostic  the same recall with the question after the eviction: what no allocation can mend
  fetch     nothing is evicted: InfiniGen's caps per layer by plan, beside one global cap at equal traffic
  layers    one layer at a time is evicted: KL against 1 - R_l
Prefill runs once per prompt; each method's cache is filled with those very keys, values and queries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import FACT_TOKENS, answer_greedily, fill_cache, force_tokens, prefill_once

from farkv.calibrate.plan import Allocation, Plan
from farkv.calibrate.planning import Budget, Choice, make_plan
from farkv.calibrate.profile import Profile
from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.ask import Prompt, build_prompt
from farkv.hf.attach import attach
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import XKV, Full, InfiniGen, Method

KEEP_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85)
AGNOSTIC_RATIOS = (0.1, 0.3, 0.5)
FETCH_RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LAYER_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
RULES = ("xkv", "loss", "uniform", "pyramid", "maxmin")
FACTS = {1024: 10, 2048: 20, 4096: 30}
CODE_STEPS = 32


class Bench:
    """One run over prompts; writes a line per prompt, method and budget."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.time()
        quiet_libraries()
        torch.set_num_threads(args.threads)
        self.model, self.tokenizer = load_model("demo", device="cpu")
        self.sources = read_sources(STDLIB, held_out=True)
        self.profile = Profile.load(args.profile)
        self.out = Path(args.out)
        if not args.add:
            self.out.write_text("")

    def plan(self, lever: str, ratio: float, rule: str) -> Plan:
        """Return the shipped profile's plan."""
        return make_plan(self.profile, Budget(ratio=ratio), (lever,), Choice(rule))

    def write(self, **row: Any) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        sys.stderr.write(f"\r{text}, {time.time() - self.started:.0f} s   ")

    def count(self, line: str) -> int:
        return len(self.tokenizer(line)["input_ids"])

    def make_recall(self, length: int, seed: int) -> tuple[Prompt, str, str]:
        """Return a prompt, its answer and its digest."""
        n_facts = FACTS[length]
        filler = draw_filler(self.sources, length - FACT_TOKENS * n_facts - 20, seed, self.count)
        made = make_recall_prompt(filler, n_facts, seed)
        sha = hashlib.sha256((made.text + made.question).encode()).hexdigest()[:16]
        return build_prompt(self.tokenizer, made.text, made.question), made.answer, sha

    def make_code(self, length: int, seed: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and those that follow."""
        text = "".join(draw_filler(self.sources, length + CODE_STEPS + 100, seed, self.count))
        tokens = self.tokenizer(text)["input_ids"][: length + CODE_STEPS]
        return tokens[:length], tokens[length:]

    def recall(self, part: str, runs: list[tuple[str, float, tuple[Method, ...], Plan | None]], *, aware: bool) -> None:
        """Ask one question of every prompt, of every method; mass and KL over all its decode steps."""
        for i in range(self.args.prompts):
            length = (2048, 4096)[i % 2]
            seed = 9_000_000 + 1000 * length + i
            prompt, answer, sha = self.make_recall(length, seed)
            prompt = prompt.read_question() if aware else prompt
            prefilled = prefill_once(self.model, prompt.text)
            with attach(self.model, Full()) as far:
                full = answer_greedily(far, fill_cache(far, prefilled), prompt.question, 4)
            expected = self.tokenizer(answer)["input_ids"]
            for name, ratio, methods, plan in runs:
                with attach(self.model, *methods, plan=plan) as far:
                    cache = fill_cache(far, prefilled, verify=64)
                    got = answer_greedily(far, cache, prompt.question, 4)
                    receipt = far.receipt(cache)
                self.write(part=part, task="recall", method=name, ratio=ratio, length=length, tokens=prompt.n_tokens,
                           seed=seed, prompt_sha=sha, agrees=got == full, right=got == expected,
                           full_right=full == expected, **measured(receipt))  # fmt: skip
            self.say(f"{part} recall {i + 1}/{self.args.prompts}")

    def code(self, part: str, runs: list[tuple[str, float, tuple[Method, ...], Plan | None]]) -> None:
        """Decode known code after every text: later queries' mass, KL and top-1 agreement."""
        for i in range(self.args.texts):
            length = (1024, 2048, 4096)[i % 3]
            seed = 9_500_000 + 1000 * length + i
            text, following = self.make_code(length, seed)
            prefilled = prefill_once(self.model, text)
            for name, ratio, methods, plan in runs:
                with attach(self.model, *methods, plan=plan) as far:
                    cache = fill_cache(far, prefilled, verify=CODE_STEPS)
                    force_tokens(far, cache, following)
                    receipt = far.receipt(cache)
                self.write(part=part, task="code", method=name, ratio=ratio, length=length, seed=seed,
                           **measured(receipt))  # fmt: skip
            self.say(f"{part} code {i + 1}/{self.args.texts}")

    def keep_runs(self, ratios: tuple[float, ...]) -> list[tuple[str, float, tuple[Method, ...], Plan | None]]:
        """Return the keep lever by every rule and budget, and XKV's allocation of each prompt by itself."""
        runs: list[tuple[str, float, tuple[Method, ...], Plan | None]] = []
        for ratio in ratios:
            runs += [(rule, ratio, (XKV(),), self.plan("keep", ratio, rule)) for rule in RULES]
            runs.append(("xkv, each prompt", ratio, (XKV(fraction=ratio),), None))
        return runs

    def run_fetch(self) -> None:
        """InfiniGen under caps by plan and under one global cap."""
        runs: list[tuple[str, float, tuple[Method, ...], Plan | None]] = []
        for ratio in FETCH_RATIOS:
            runs.append(("one global cap", ratio, (InfiniGen(fraction=ratio),), None))
            for rule in ("xkv", "loss"):
                plan = self.plan("fetch", ratio, rule)
                runs.append((f"plan, {rule}", ratio, (InfiniGen(fraction=min(1.0, ratio + 1e-3)),), plan))
        self.recall("fetch", runs, aware=False)
        self.code("fetch", runs)

    def run_layers(self) -> None:
        """Evict one layer at a time to several shares; all others keep everything."""
        layers = self.profile.curves().layers
        runs: list[tuple[str, float, tuple[Method, ...], Plan | None]] = []
        for layer in layers:
            for share in LAYER_SHARES:
                shares = tuple(share if i == layer else 1.0 for i in layers)
                one = Allocation(shares, 0, "one layer", {}, shares, shares)
                runs.append((f"layer {layer}", share, (XKV(),), Plan(self.profile.identity, layers, {"keep": one})))
        self.recall("layers", runs, aware=True)
        self.code("layers", runs)

    def run(self) -> None:
        """Run the parts that were asked for."""
        for part in self.args.parts:
            if part == "keep":
                self.recall(part, self.keep_runs(KEEP_RATIOS), aware=True)
                self.code(part, self.keep_runs(KEEP_RATIOS))
            elif part == "agnostic":
                self.recall(part, self.keep_runs(AGNOSTIC_RATIOS), aware=False)
            elif part == "fetch":
                self.run_fetch()
            else:
                self.run_layers()
        sys.stderr.write("\n")


def measured(receipt: Any) -> dict[str, Any]:
    """Return what a receipt says, as a row's columns; `layers` is the mass that each layer's choice held."""
    q = receipt.quality
    return dict(kept=receipt.kept_fraction, read=receipt.read_fraction, index=receipt.index_fraction, kl=q.kl_mean,
                top1=q.top1_agreement, mass=q.mass_mean, layers=[row.mass_mean for row in receipt.layers])  # fmt: skip


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/xkv_quality.jsonl")
    parser.add_argument("--parts", default="keep,agnostic,fetch,layers", type=lambda text: text.split(","))
    parser.add_argument("--prompts", default=24, type=int, help="recall prompts of each part")
    parser.add_argument("--texts", default=9, type=int, help="code texts of each part")
    parser.add_argument("--profile", default=str(MODEL_PATH / "profile.safetensors"))
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--add", action="store_true", help="add to the file")
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
