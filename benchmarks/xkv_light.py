"""What does a lighter mini-inference cost in accuracy? `Light` against the full pass, on the demo model.

    python benchmarks/xkv_light.py --out benchmarks/results/xkv_light.jsonl

In: held-out recall prompts that end with their question. Out: a JSON line per variant: its time beside the full
pass's (interleaved, medians), the mean absolute difference of the mean cumulative curves, and, at each budget, the
retention on the full curves of the allocation that it leads to, beside that of the full curves' own allocation and of
an equal split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import farkv
from farkv.calibrate.curves import Curves
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.load import load_model
from farkv.math.allocate import allocate, measure_retention
from farkv.measure.mini import Light

LENGTHS = (1024, 2048, 4096, 6144)
FACTS = 30
FACT_TOKENS = 14
SEED = 7_150_000
RATIOS = (0.1, 0.2, 0.4)
VARIANTS = [Light(tokens, layers) for layers in (1, 2) for tokens in (0.25, 0.5, 1.0)]


def make_rows(tokenizer: Any, n: int) -> list[list[int]]:
    """Return n prompts, their lengths taking turns."""
    sources = read_sources(STDLIB, held_out=True)
    rows = []
    for i in range(n):
        size = LENGTHS[i % len(LENGTHS)] - FACT_TOKENS * (FACTS + 1)
        filler = draw_filler(sources, size, SEED + i, lambda line: len(tokenizer(line)["input_ids"]))
        made = make_recall_prompt(filler, FACTS, SEED + i)
        rows.append(tokenizer(made.text + made.question)["input_ids"])
    return rows


def measure(model: Any, row: list[int], light: Light | None) -> tuple[float, Curves]:
    """Return seconds and curves of one prompt."""
    started = time.perf_counter()
    if light is None:
        # Curves alone, as a light pass measures them: the price of the skew is not the full pass's fault.
        light = Light(1.0, 1)
    curves = farkv.profile(model, [row], light=light).curves()
    return time.perf_counter() - started, curves


def judge(full: Any, guess: Any, ratio: float) -> float:
    """Return the retention on `full` of what `guess` leads to."""
    return measure_retention(full, allocate(guess, ratio=ratio))


def compare(name: dict[str, Any], full: list[Curves], light: list[Curves], ratios: list[float]) -> dict[str, Any]:
    """Return one row: curves of both averaged over prompts, then judged."""
    row: dict[str, Any] = {**name, "n": len(full), "seconds_ratio": statistics.median(ratios)}
    for kind in ("keep", "spread"):
        a, b = ([c.keep if kind == "keep" else c.spread for c in some] for some in (full, light))
        each_a, each_b = torch.cat(a), torch.cat(b)
        gap = (each_a.mean(0).cumsum(-1) - each_b.mean(0).cumsum(-1)).abs()
        row[f"{kind}_error"] = float(gap.mean())
        row[f"{kind}_error_worst_layer"] = float(gap.mean(-1).max())
        row[f"{kind}_error_one_prompt"] = float((each_a.cumsum(-1) - each_b.cumsum(-1)).abs().mean())
    mean_full = torch.cat([c.keep for c in full]).mean(0).sort(-1, descending=True).values.numpy()
    mean_light = torch.cat([c.keep for c in light]).mean(0).sort(-1, descending=True).values.numpy()
    flat = torch.full(mean_full.shape, 1 / mean_full.shape[1]).numpy()
    row["retention"] = {
        str(ratio): {
            "full": judge(mean_full, mean_full, ratio),
            "light": judge(mean_full, mean_light, ratio),
            "uniform": judge(mean_full, flat, ratio),
        }
        for ratio in RATIOS
    }
    return row


def main() -> None:
    """Parse the command line and run every variant on every prompt, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/xkv_light.jsonl")
    parser.add_argument("-n", default=16, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo", device="cpu")
    rows = make_rows(tokenizer, args.n)
    sha = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    measure(model, rows[0], None)
    found: dict[Light | None, list[tuple[float, Curves]]] = {variant: [] for variant in (None, *VARIANTS)}
    for i, row in enumerate(rows):
        for variant, done in found.items():
            done.append(measure(model, row, variant))
        print(f"{i + 1}/{len(rows)}", end="\r", flush=True)
    full = [curves for _, curves in found[None]]
    lines = []
    for variant in VARIANTS:
        ratios = [s / s0 for (s, _), (s0, _) in zip(found[variant], found[None], strict=True)]
        name = {"tokens": variant.tokens, "layers": variant.layers, "prompts_sha": sha}
        lines.append(json.dumps(compare(name, full, [c for _, c in found[variant]], ratios)) + "\n")
    Path(args.out).write_text("".join(lines))
    print(format_table(Path(args.out)))


def format_table(path: Path) -> str:
    """Return one Markdown row per variant: time, error of the curves, loss of retention and what there was to lose."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    budgets = list(rows[0]["retention"])
    lines = [
        "| tokens | every n-th block | time, of the full pass | error of the curves | error of one prompt's | "
        + " | ".join(f"retention at {float(b):.0%}: full, light, uniform" for b in budgets)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(budgets),
    ]
    for row in rows:
        cells = [
            f"{row['tokens']:.0%}",
            f"{row['layers']}",
            f"{row['seconds_ratio']:.2f}",
            f"{row['keep_error']:.3f}",
            f"{row['keep_error_one_prompt']:.3f}",
            *(", ".join(f"{row['retention'][b][who]:.4f}" for who in ("full", "light", "uniform")) for b in budgets),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
