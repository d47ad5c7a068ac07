"""Measure the demo model: recall at several lengths, chains, and code loss by position in the text.

    python training/eval_demo.py                                  # the package's model
    python training/eval_demo.py --json results.json --png loss.png

In: an exported model folder. Out: a table with counts and 95 % intervals, and if asked for a JSON
file and a picture. Decoding is greedy with the full cache: with the right digits as input, all four
are the argmax exactly when greedy decoding writes them, so one forward pass per prompt is enough.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from corpus import read_stdlib, read_third_party
from prompts import Filler, draw_prompt
from samples import DIGITS, encode_lines
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

PACKAGE = Path(__file__).parent.parent / "src/farkv/demo/model"
EDGES = (0, 64, 256, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Bar:
    """One row of the recall table."""

    name: str
    filler: str
    length: int
    facts: int
    hops: int
    goal: float | None


BARS = (
    Bar("recall 2K, 20 facts", "held out", 2048, 20, 0, 0.95),
    Bar("recall 4K, 30 facts", "held out", 4096, 30, 0, 0.85),
    Bar("recall 8K, 40 facts", "held out", 8192, 40, 0, None),
    Bar("recall 2K, 20 facts", "third party", 2048, 20, 0, 0.85),
    Bar("recall 4K, 30 facts", "third party", 4096, 30, 0, 0.85),
    Bar("chain of 1 hop, 2K, 20 facts", "held out", 2048, 20, 1, None),
    Bar("chain of 2 hops, 2K, 20 facts", "held out", 2048, 20, 2, None),
)


def find_interval(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, p = 1.96, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


class Worker:
    """One process's model and text; a task is a few prompts or a few windows."""

    def __init__(self, folder: str):
        torch.set_num_threads(1)
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        held_out = read_stdlib(held_out=True)
        self.fillers = {"held out": Filler(self.tokenizer, held_out)}
        self.tokens = encode_lines(self.tokenizer, held_out)[0]

    def find_filler(self, name: str) -> Filler:
        if name not in self.fillers:
            self.fillers[name] = Filler(self.tokenizer, read_third_party())
        return self.fillers[name]

    @torch.no_grad()
    def ask(self, bar: Bar, seeds: list[int]) -> tuple[int, int]:
        """Return how many prompts greedy decoding answers, and their tokens in all."""
        right = total = 0
        for seed in seeds:
            ids = draw_prompt(self.find_filler(bar.filler), bar.length, bar.facts, seed, bar.hops)
            states = self.model.model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state
            guess = self.model.lm_head(states[0, -DIGITS:]).argmax(-1)
            right += guess.tolist() == ids[-DIGITS:]
            total += len(ids)
        return right, total

    @torch.no_grad()
    def read(self, starts: list[int], length: int) -> np.ndarray:
        """Return the loss (window, position) on the windows that begin at `starts`."""
        losses = np.empty((len(starts), length), np.float32)
        for row, start in enumerate(starts):
            ids = torch.from_numpy(self.tokens[start : start + length + 1].astype(np.int64))
            logits = self.model(ids[None, :-1], use_cache=False).logits[0].float()
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            losses[row] = each.numpy()
        return losses

    def count_tokens(self) -> int:
        return len(self.tokens)


def start(folder: str) -> None:
    """Make the process's worker."""
    global WORKER  # noqa: PLW0603
    WORKER = Worker(folder)


def call(name: str, *args):
    """Run a method of the process's worker."""
    return getattr(WORKER, name)(*args)


def split(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def measure_bar(pool: ProcessPoolExecutor, bar: Bar, n: int, seed: int) -> dict:
    """Ask `n` prompts of one row and return its numbers."""
    groups = split(list(range(seed, seed + n)), 5)
    answers = [pool.submit(call, "ask", bar, group) for group in groups]
    right, total = np.sum([a.result() for a in answers], axis=0).tolist()
    low, high = find_interval(right, n)
    return {
        "name": bar.name,
        "filler": bar.filler,
        "mean_tokens": round(total / n),
        "right": right,
        "prompts": n,
        "recall": round(right / n, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "goal": bar.goal,
    }


def measure_windows(pool: ProcessPoolExecutor, length: int, n: int) -> np.ndarray:
    """Return the loss (window, position) on `n` evenly spaced windows of the held-out text."""
    last = pool.submit(call, "count_tokens").result() - length - 1
    groups = split(np.linspace(0, last, n).astype(int).tolist(), 2)
    return np.concatenate(list(pool.map(call, ["read"] * len(groups), groups, [length] * len(groups))))


def measure_loss(pool: ProcessPoolExecutor, n_long: int, n_short: int) -> list[dict]:
    """Return the mean loss per position bucket; many short windows serve the buckets below 1K."""
    short = measure_windows(pool, 1024, n_short)
    long = measure_windows(pool, EDGES[-1], n_long)
    rows = []
    for low, high in pairwise(EDGES):
        means = (short if high <= 1024 else long)[:, low:high].mean(1)
        rows.append(
            {
                "from": low,
                "to": high,
                "loss": round(float(means.mean()), 4),
                "error": round(float(means.std(ddof=1) / len(means) ** 0.5), 4),
                "windows": len(means),
            }
        )
    return rows


def draw_picture(rows: list[dict], path: Path) -> None:
    """Draw the loss by position with its standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{r['from']}-{r['to']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    heights, errors = [r["loss"] for r in rows], [r["error"] for r in rows]
    axes.errorbar(labels, heights, yerr=errors, marker="o", capsize=3)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss per token (nats)")
    axes.set_title("Demo model on held-out standard library files")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_bar(row: dict) -> None:
    goal = f"   bar {row['goal']:.0%}" if row["goal"] else ""
    share = f"{row['recall']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]"
    count = f"{row['right']:4d}/{row['prompts']}"
    what = f"{row['name']:30s} {row['filler']:12s} {row['mean_tokens']:5d}"
    print(what, count, share + goal, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PACKAGE), help="folder of the exported model")
    parser.add_argument("--prompts", type=int, default=100, help="prompts per row")
    parser.add_argument("--long", type=int, default=40, help="windows of 8K tokens for the loss")
    parser.add_argument("--short", type=int, default=300, help="windows of 1K tokens for the loss")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--png", type=Path, help="write the picture here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    began = time.time()
    third = bool(read_third_party())
    print(f"{'':30s} {'filler':12s} tokens  right  share  95 % interval")
    bars = []
    with ProcessPoolExecutor(args.workers, initializer=start, initargs=(args.model,)) as pool:
        for bar in BARS:
            if third or bar.filler != "third party":
                bars.append(measure_bar(pool, bar, args.prompts, args.seed))
                print_bar(bars[-1])
        losses = measure_loss(pool, args.long, args.short)
    print("\nposition      loss    standard error (over windows)")
    for r in losses:
        print(f"{r['from']:5d}-{r['to']:5d}  {r['loss']:.4f}  {r['error']:.4f}")
    if args.json:
        found = {"recall": bars, "loss": losses, "seconds": round(time.time() - began)}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.png:
        draw_picture(losses, args.png)


if __name__ == "__main__":
    main()
