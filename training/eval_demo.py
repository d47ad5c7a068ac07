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
    Bar("chain of 1 hop, 4K, 30 facts", "held out", 4096, 30, 1, None),
)


def find_interval(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, p = 1.96, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def answer_one(model, ids: list[int]) -> bool:
    """Say whether greedy decoding writes the prompt's last four tokens."""
    states = model.model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state
    guess = model.lm_head(states[0, -DIGITS:]).argmax(-1)
    return guess.tolist() == ids[-DIGITS:]


def measure_bar(model, bar: Bar, filler: Filler, n: int, seed: int) -> dict:
    """Ask `n` prompts of one row and return its numbers."""
    prompts = [draw_prompt(filler, bar.length, bar.facts, seed + i, bar.hops) for i in range(n)]
    right = sum(answer_one(model, ids) for ids in prompts)
    low, high = find_interval(right, n)
    return {
        "name": bar.name,
        "filler": bar.filler,
        "mean_tokens": round(float(np.mean([len(p) for p in prompts]))),
        "right": right,
        "prompts": n,
        "recall": round(right / n, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "goal": bar.goal,
    }


@torch.no_grad()
def measure_windows(model, tokens: np.ndarray, length: int, n: int) -> np.ndarray:
    """Return the loss (window, position) on `n` evenly spaced windows of the text."""
    starts = np.linspace(0, len(tokens) - length - 1, n).astype(int)
    losses = np.empty((n, length), np.float32)
    for row, start in enumerate(starts):
        ids = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        logits = model(ids[None, :-1], use_cache=False).logits[0].float()
        losses[row] = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    return losses


def measure_loss(model, tokens: np.ndarray, n_long: int, n_short: int) -> list[dict]:
    """Return the mean loss per position bucket; many short windows serve the buckets below 1K."""
    short = measure_windows(model, tokens, 1024, n_short)
    long = measure_windows(model, tokens, EDGES[-1], n_long)
    rows = []
    for low, high in pairwise(EDGES):
        part = (short if high <= 1024 else long)[:, low:high]
        means = part.mean(1)
        error = means.std(ddof=1) / len(means) ** 0.5
        rows.append(
            {
                "from": low,
                "to": high,
                "loss": round(float(means.mean()), 4),
                "error": round(float(error), 4),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(PACKAGE), help="folder of the exported model")
    parser.add_argument("--prompts", type=int, default=120, help="prompts per row")
    parser.add_argument("--long", type=int, default=40, help="windows of 8K tokens for the loss")
    parser.add_argument("--short", type=int, default=300, help="windows of 1K tokens for the loss")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--png", type=Path, help="write the picture here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.time()
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    held_out = read_stdlib(held_out=True)
    fillers = {"held out": Filler(tokenizer, held_out)}
    if third := read_third_party():
        fillers["third party"] = Filler(tokenizer, third)
    print(f"{'':30s} {'filler':12s} tokens  right  share  95 % interval")
    bars = []
    for bar in BARS:
        if bar.filler in fillers:
            bars.append(measure_bar(model, bar, fillers[bar.filler], args.prompts, args.seed))
            print_bar(bars[-1])
    losses = measure_loss(model, encode_lines(tokenizer, held_out)[0], args.long, args.short)
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
