"""What do rounded records cost? InfiniGen at 0.10 over records as they came, in int8 and in int4.

    python benchmarks/quant.py

In: the demo model, held-out standard-library files. Out: a JSON line per text and storage. Every run is real: the text
is read in passes of 512 tokens over rounded records, and the question or the known code is decoded over them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from eviction import ask_all, make_questions
from quality import force_tokens, mean, percent, read_numbers, read_rows

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.hf.ask import Listener, prefill
from farkv.hf.attach import attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import Full, InfiniGen

STORED = (None, "int8", "int4")
CHUNK_TOKENS = 512
CODE_STEPS = 64


class Bench:
    """One run over texts; writes a line per text and storage."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.time()
        quiet_libraries()
        torch.set_num_threads(args.threads)
        self.model, self.tokenizer = load_model("demo", device="cpu")
        self.sources = read_sources(STDLIB, held_out=True)
        self.out = Path(args.out)
        self.out.write_text("")

    def write(self, far: Handle, cache: FarCache, stored: str | None, **row: Any) -> None:
        """Write a line; `pool` is the bytes of the stored records alone, index and buffers apart."""
        receipt, recipe = far.receipt(cache), cache.recipe
        rows = sum(p.length * p.n_bytes // p.capacity for p in recipe.store.pool.values())
        row |= dict(stored=stored or "as they came", pool=rows, kv_bytes=receipt.kv_bytes.total,
                    max_error=receipt.quant.max_error, read=receipt.read_fraction)  # fmt: skip
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def run_recall(self, length: int, seed: int) -> None:
        """Ask several questions of one text."""
        asked = make_questions(self.tokenizer, self.sources, length, seed)
        with attach(self.model, Full()) as far:
            cache = far.new_cache()
            prefill(far, cache, asked.text, CHUNK_TOKENS, Listener())
            full = ask_all(far, cache, asked.questions)
        for stored in STORED:
            with attach(self.model, InfiniGen(fraction=0.10), quant=stored) as far:
                cache = far.new_cache()
                prefill(far, cache, asked.text, CHUNK_TOKENS, Listener())
                got = ask_all(far, cache, asked.questions)
                self.write(far, cache, stored, task="recall", length=length, seed=seed,
                           agrees=[a == b for a, b in zip(got, full, strict=True)],
                           right=[a == b for a, b in zip(got, asked.answers, strict=True)])  # fmt: skip

    def run_code(self, length: int, seed: int) -> None:
        """Decode known code after one text."""
        text = "".join(draw_filler(self.sources, length + CODE_STEPS + 100, seed, self.count))
        tokens = self.tokenizer(text)["input_ids"][: length + CODE_STEPS]
        with attach(self.model, Full()) as far:
            cache = far.new_cache()
            prefill(far, cache, tokens[:length], CHUNK_TOKENS, Listener())
            full = force_tokens(far, cache, tokens[length:])
        for stored in STORED:
            with attach(self.model, InfiniGen(fraction=0.10), quant=stored) as far:
                cache = far.new_cache()
                prefill(far, cache, tokens[:length], CHUNK_TOKENS, Listener())
                logs = force_tokens(far, cache, tokens[length:])
                kl = float((full.exp() * (full - logs)).sum(-1).mean())
                top1 = float((full.argmax(-1) == logs.argmax(-1)).float().mean())
                self.write(far, cache, stored, task="code", length=length, seed=seed, kl=kl, top1=top1)

    def count(self, line: str) -> int:
        return len(self.tokenizer(line)["input_ids"])

    def run(self) -> None:
        """Run all texts of all lengths."""
        for length, n_texts, n_codes in zip(self.args.lengths, self.args.texts, self.args.codes, strict=True):
            for i in range(n_texts):
                self.run_recall(length, 14_000_000 + 1000 * length + i)
            for i in range(n_codes):
                self.run_code(length, 15_000_000 + 1000 * length + i)
            sys.stderr.write(f"{length}: {time.time() - self.started:.0f} s\n")
        print(format_table(self.out))


def format_table(path: Path) -> str:
    """Return one Markdown row per storage."""
    rows = read_rows(path)
    head = ["records", "bytes in the pool", "agrees", "right", "KL on code", "same first choice on code"]
    lines = [f"| {' | '.join([*head, 'largest error of a value'])} |", "|---" * (len(head) + 1) + "|"]
    for stored in dict.fromkeys(r["stored"] for r in rows):
        mine = [r for r in rows if r["stored"] == stored]
        recall, code = ([r for r in mine if r["task"] == task] for task in ("recall", "code"))
        errors = [r["max_error"] for r in mine if r["max_error"] is not None]
        cells = [stored, f"{mean(r['pool'] / r['kv_bytes'] for r in mine):.3f}"]
        cells += [percent(x for r in recall for x in r[key]) for key in ("agrees", "right")]
        cells += [f"{mean(r['kl'] for r in code):.4f}", percent(r["top1"] for r in code)]
        lines.append(f"| {' | '.join([*cells, f'{max(errors):.3f}' if errors else '0'])} |")
    n = sum(len(r["agrees"]) for r in rows if r["task"] == "recall" and r["stored"] == "int8")
    n_codes = sum(r["task"] == "code" and r["stored"] == "int8" for r in rows)
    return "\n".join([*lines, "", f"{n} questions, {n_codes} texts of code with {CODE_STEPS} steps each."])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/quant.jsonl")
    parser.add_argument("--lengths", default="2048,4096", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--texts", default="2,1", type=read_numbers, help="recall texts, one number a length")
    parser.add_argument("--codes", default="2,0", type=read_numbers, help="code texts, one number a length")
    parser.add_argument("--threads", default=1, type=int)
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
