"""What does a full pool cost? Eviction policies at host limits from 50 to 100 % of the KV: agreement, KL, what is kept.

    python benchmarks/eviction.py
    python benchmarks/eviction.py --lengths 2048 --texts 2 --codes 1

In: the demo model, held-out standard-library files. Out: a JSON line per text, policy and limit, a table at the end.
Every run is real: the text is read in passes of 256 tokens under the limit, so that records go while the prompt is
read, and what is gone is missing in the later passes too. Two tasks:
  recall  several questions about one text, each asked of its own copy of the cache: is the answer the full cache's?
  code    known code is decoded token by token: KL of the predictions to the full cache's, in nats
The limit is bytes, not records: the pool's books and marks count in it, so that a limit of 100 % keeps about 93 % of
the demo's records. The context is announced: otherwise the growth of one layer would have to fit too. `peak` is
asserted against the limit in every run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality import FACT_TOKENS, answer_greedily, force_tokens, mean, percent, read_numbers, read_rows

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt, question_line
from farkv.hf.ask import Listener, build_prompt, prefill
from farkv.hf.attach import attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import Full, InfiniGen, Method
from farkv.store.far.eviction import POLICIES

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FACTS = {2048: 20, 4096: 30, 8192: 40}
CHUNK_TOKENS = 256
QUESTIONS = 6
ANSWER_TOKENS = 4
CODE_STEPS = 64
METHODS: dict[str, Method] = {"infinigen 0.10": InfiniGen(fraction=0.10), "full": Full()}


class Run(NamedTuple):
    """A selector under a policy and a limit; no policy and no limit: everything is kept."""

    method: str
    policy: str | None = None
    limit: float | None = None


class Questions(NamedTuple):
    """A text with facts, and questions about several of them, in tokens."""

    text: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    sha: str


class Bench:
    """One run over texts; writes a line per text, policy and limit."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.time()
        quiet_libraries()
        torch.set_num_threads(args.threads)
        self.model, self.tokenizer = load_model("demo", device="cpu")
        self.sources = read_sources(STDLIB, held_out=True)
        self.out = Path(args.out)
        if not args.add:
            self.out.write_text("")
        limited = [Run(m, p, limit) for m in args.methods for limit in LIMITS for p in POLICIES]
        self.runs = [*(Run(m) for m in args.methods), *limited]

    def write(self, **row: Any) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        sys.stderr.write(f"\r{text}, {time.time() - self.started:.0f} s   ")

    def count(self, line: str) -> int:
        return len(self.tokenizer(line)["input_ids"])

    def read(self, text: list[int], runs: list[Run]) -> Iterator[tuple[Run, Handle, FarCache, int | None]]:
        """Read a text under every run's limit; give the cache while its handle is attached."""
        config = self.model.config
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        for run in runs:
            host = None if run.limit is None else int(run.limit * token_bytes * len(text))
            with attach(self.model, METHODS[run.method], host=host, evict=run.policy or "refuse") as far:
                # Announced, so that the pool is allocated at once and no layer needs room to grow.
                cache = far.new_cache(tokens=len(text) + CODE_STEPS, chunk_tokens=CHUNK_TOKENS)
                prefill(far, cache, text, CHUNK_TOKENS, Listener())
                yield run, far, cache, host

    def run_recall(self, length: int, seed: int) -> None:
        """Ask several questions of one text, of every run."""
        asked = make_questions(self.tokenizer, self.sources, length, seed)
        with attach(self.model, Full()) as far:
            cache = far.new_cache()
            prefill(far, cache, asked.text, CHUNK_TOKENS, Listener())
            full = ask_all(far, cache, asked.questions)
        for run, far, cache, host in self.read(asked.text, self.runs):
            for i, question in enumerate(asked.questions):
                twin = copy.deepcopy(cache)
                got = answer_greedily(far, twin, question, ANSWER_TOKENS)
                self.write(task="recall", length=length, tokens=len(asked.text), seed=seed, question=i,
                           text_sha=asked.sha, agrees=got == full[i], right=got == asked.answers[i],
                           full_right=full[i] == asked.answers[i], **measured(run, far, twin, host))  # fmt: skip
            self.say(f"recall {length}, text {seed % 1000}: {run.policy} {run.limit}")

    def run_code(self, length: int, seed: int) -> None:
        """Decode known code after one text, in every run."""
        text = "".join(draw_filler(self.sources, length + CODE_STEPS + 100, seed, self.count))
        tokens = self.tokenizer(text)["input_ids"][: length + CODE_STEPS]
        with attach(self.model, Full()) as far:
            cache = far.new_cache()
            prefill(far, cache, tokens[:length], CHUNK_TOKENS, Listener())
            full = force_tokens(far, cache, tokens[length:])
        for run, far, cache, host in self.read(tokens[:length], self.runs):
            logs = force_tokens(far, cache, tokens[length:])
            kl = float((full.exp() * (full - logs)).sum(-1).mean())
            top1 = float((full.argmax(-1) == logs.argmax(-1)).float().mean())
            self.write(task="code", length=length, seed=seed, kl=kl, top1=top1, **measured(run, far, cache, host))
            self.say(f"code {length}, text {seed % 1000}: {run.policy} {run.limit}")

    def run(self) -> None:
        """Run all texts of all lengths."""
        for length, n_texts, n_codes in zip(self.args.lengths, self.args.texts, self.args.codes, strict=True):
            for i in range(self.args.first, n_texts if "recall" in self.args.tasks else 0):
                self.run_recall(length, 11_000_000 + 1000 * length + i)
            for i in range(self.args.first, n_codes if "code" in self.args.tasks else 0):
                self.run_code(length, 12_000_000 + 1000 * length + i)
        sys.stderr.write("\n")
        print(format_table(self.out))


def make_questions(tokenizer: Any, sources: dict[str, str], length: int, seed: int) -> Questions:
    """Make a text of about `length` tokens, and questions about facts that are spread over it."""
    n_facts = FACTS[length]
    filler = draw_filler(
        sources, length - FACT_TOKENS * n_facts - 20, seed, lambda line: len(tokenizer(line).input_ids)
    )
    text = make_recall_prompt(filler, n_facts, seed).text
    asked = find_facts(text, filler)[seed % 3 :: n_facts // QUESTIONS][:QUESTIONS]
    prompts = [build_prompt(tokenizer, text, question_line(name)) for name, _ in asked]
    tokens = min((p.text for p in prompts), key=len)
    questions = [(p.text + p.question)[len(tokens) :] for p in prompts]
    answers = [tokenizer(value)["input_ids"] for _, value in asked]
    return Questions(tokens, questions, answers, hashlib.sha256(text.encode()).hexdigest()[:16])


def ask_all(far: Handle, cache: FarCache, questions: list[list[int]]) -> list[list[int]]:
    """Return the answers, each asked of its own copy of the cache."""
    return [answer_greedily(far, copy.deepcopy(cache), question, ANSWER_TOKENS) for question in questions]


def find_facts(text: str, filler: list[str]) -> list[tuple[str, str]]:
    """Return the facts of a text, name and value, in their order: its lines that are not filler's."""
    rest, facts = iter(filler), []
    following = next(rest, None)
    for line in text.splitlines(keepends=True):
        if line == following:
            following = next(rest, None)
        else:
            name, value = line.strip().split(" = ")
            facts.append((name, value))
    return facts


def measured(run: Run, far: Handle, cache: FarCache, host: int | None) -> dict[str, Any]:
    """Return what a receipt says, and hold the pool to its limit."""
    receipt = far.receipt(cache)
    peak = receipt.kv_bytes.host_peak
    assert host is None or peak <= host, f"{run}: the pool took {peak:,} of {host:,} bytes"
    return dict(method=run.method, policy=run.policy, limit=run.limit, host_limit=host, host_peak=peak,
                kept=receipt.kept_fraction, evicted=receipt.evicted_records, read=receipt.read_fraction)  # fmt: skip


def format_table(path: Path) -> str:
    """Return one Markdown row per policy, agreement and KL at every limit; the first row keeps everything."""
    every = read_rows(path)
    blocks = []
    for method in dict.fromkeys(r["method"] for r in every):
        rows = [r for r in every if r["method"] == method]
        limits = sorted({r["limit"] for r in rows if r["limit"]})
        none = [r for r in rows if r["limit"] is None]
        head = [f"{method}: host limit, of the KV", *(f"{limit:.0%}" for limit in limits), "no limit"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        kept = [mean(r["kept"] for r in rows if r["limit"] == limit) for limit in limits]
        lines.append(f"| records kept | {' | '.join(f'{k:.0%}' for k in kept)} | 100% |")
        evicted = [mean(r["evicted"] for r in rows if r["limit"] == limit and r["length"] == 2048) for limit in limits]
        lines.append(f"| records evicted of a 2 K text | {' | '.join(f'{n:,.0f}' for n in evicted)} | 0 |")
        for name, task, show in (("agrees", "recall", percent), ("KL on code", "code", format_kl)):
            key = "agrees" if task == "recall" else "kl"
            for policy in POLICIES:
                cells = [
                    show(r[key] for r in rows if (r["task"], r["limit"], r["policy"]) == (task, limit, policy))
                    for limit in limits
                ]
                last = show(r[key] for r in none if r["task"] == task)
                lines.append(f"| {policy}: {name} | {' | '.join(cells)} | {last} |")
        blocks.append("\n".join(lines))
    recall = {(r["seed"], r["question"]): r["full_right"] for r in every if r["task"] == "recall"}
    codes = {r["seed"] for r in every if r["task"] == "code"}
    texts = len({seed for seed, _ in recall})
    blocks.append(
        f"{len(recall)} questions about {texts} texts, {len(codes)} texts of code with {CODE_STEPS} steps each. "
        f"The full cache is right on {percent(recall.values())}."
    )
    return "\n\n".join(blocks)


def format_kl(values: Any) -> str:
    """Return a mean in nats."""
    return f"{mean(values):.3f}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/eviction.jsonl")
    parser.add_argument("--lengths", default="2048,4096", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--texts", default="2,0", type=read_numbers, help="recall texts, one number a length")
    parser.add_argument("--codes", default="2,0", type=read_numbers, help="code texts, one number a length")
    parser.add_argument("--tasks", default="recall,code", type=lambda text: text.split(","))
    parser.add_argument("--add", action="store_true", help="add to the file")
    parser.add_argument("--first", default=0, type=int, help="the first text's number, where the file has others")
    parser.add_argument("--methods", default="infinigen 0.10", type=lambda text: text.split(","))
    parser.add_argument("--threads", default=1, type=int)
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
