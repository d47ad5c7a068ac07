"""Does a promised retention hold on prompts that were never seen? The paper's rule beside a conformal margin.

    python benchmarks/xkv_coverage.py --out benchmarks/results/xkv_coverage.jsonl

In: fresh held-out recall prompts of the demo model, of mixed lengths. Out: a JSON line per target and rule: how many
of the test prompts kept the retention that was promised, with an exact (Clopper-Pearson) 95 % interval, and how much
was kept. The calibration prompts are drawn like the test prompts; a last row per target calibrates on the shipped
profile instead, whose prompts are of other files and names. The promise is about the draw of calibration and test
prompts together, so `redrawn` is the mean coverage when the same prompts are split anew 200 times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta

import farkv
from farkv.calibrate.conformal import allocate_promise, average_allocations
from farkv.calibrate.curves import GRID, Curves
from farkv.calibrate.profile import Profile
from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.load import load_model, quiet_libraries
from farkv.math.allocate import allocate, measure_retention
from farkv.measure.mini import Light

SEED = 8_200_000
FACTS, FACT_TOKENS = 30, 14
SHORTEST, LONGEST = 1024, 4096
TARGETS = (0.8, 0.9, 0.95)
CONFIDENCE = 0.9


def make_rows(tokenizer: Any, n: int) -> list[list[int]]:
    """Return n prompts of random lengths, each ending with its question."""
    sources, rng = read_sources(STDLIB, held_out=True), random.Random(SEED)
    rows = []
    for i in range(n):
        size = rng.randint(SHORTEST, LONGEST) - FACT_TOKENS * (FACTS + 1)
        filler = draw_filler(sources, size, SEED + i, lambda line: len(tokenizer(line)["input_ids"]))
        made = make_recall_prompt(filler, FACTS, SEED + i)
        rows.append(tokenizer(made.text + made.question)["input_ids"])
    return rows


def share_plans(fit: Curves, calibration: Curves, target: float) -> dict[str, np.ndarray]:
    """Return cells per layer of every rule, all from the same prompts."""
    both = np.concatenate([fit.keep.numpy(), calibration.keep.numpy()])
    promise = allocate_promise(fit.keep.numpy(), calibration.keep.numpy(), retention=target, confidence=CONFIDENCE)
    return {
        "conformal margin": promise.tokens,
        "paper: mean of the samples' allocations": average_allocations(both, retention=target),
        "mean curve": allocate(both.mean(0), retention=target),
    }


def judge(cells: np.ndarray, tests: np.ndarray, target: float) -> dict[str, float]:
    """Return coverage and its interval."""
    held = np.array([measure_retention(row, cells) for row in tests])
    good, n = int((held >= target).sum()), len(held)
    low = float(beta.ppf(0.025, good, n - good + 1)) if good else 0.0
    high = float(beta.ppf(0.975, good + 1, n - good)) if good < n else 1.0
    return {
        "covered": good / n, "low": low, "high": high, "n": n,
        "kept": float(cells.mean()) / GRID, "worst": float(held.min()), "mean": float(held.mean()),
    }  # fmt: skip


def judge_redraw(curves: Curves, order: np.ndarray, n_samples: int, target: float) -> dict[str, float]:
    """Return every rule's coverage for another split of the same prompts into samples and tests."""
    half = n_samples // 2
    fit, calibration = curves.take(order[:half].tolist()), curves.take(order[half:n_samples].tolist())
    tests = curves.take(order[n_samples:].tolist()).keep.numpy()
    plans = share_plans(fit, calibration, target)
    cumulative = tests.cumsum(-1, dtype=np.float64)
    at = np.arange(tests.shape[1])
    covered = {}
    for name, cells in plans.items():
        held = (cumulative[:, at, np.maximum(cells, 1) - 1] * (cells > 0) / cumulative[..., -1]).mean(-1)
        covered[name] = float((held >= target).mean())
    return covered


def main() -> None:
    """Measure the prompts' curves once (resumable), then judge every rule on the same test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/xkv_coverage.jsonl")
    parser.add_argument("--tests", default=300, type=int)
    parser.add_argument("--samples", default=120, type=int, help="fit and calibration together")
    parser.add_argument("--redraws", default=200, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    model, tokenizer = load_model("demo", device="cpu")
    rows = make_rows(tokenizer, args.tests + args.samples)
    Path("runs").mkdir(exist_ok=True)
    measured = farkv.profile(
        model, rows, light=Light(1.0, 1), resume=Path("runs/xkv_coverage.part"),
        on_prompt=lambda done, total: sys.stderr.write(f"\r{done}/{total} "),
    )  # fmt: skip
    keep = measured.curves()
    samples, tests = keep.take(range(args.samples)), keep.take(range(args.samples, len(rows)))
    fit, calibration = samples.split(0.5)
    rng = np.random.default_rng(SEED)
    redraws = [rng.permutation(len(rows)) for _ in range(args.redraws)]
    shipped = Profile.load(MODEL_PATH / "profile.safetensors").curves().split(0.5)
    sha = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    lines = []
    for target in TARGETS:
        again = [judge_redraw(keep, order, args.samples, target) for order in redraws]
        redrawn = {name: float(np.mean([held[name] for held in again])) for name in again[0]}
        plans = share_plans(fit, calibration, target)
        plans["conformal, shipped profile"] = share_plans(*shipped, target)["conformal margin"]
        for name, cells in plans.items():
            found = judge(cells, tests.keep.numpy(), target)
            lines.append({"target": target, "rule": name, "confidence": CONFIDENCE, "prompts_sha": sha,
                          "redrawn": redrawn.get(name), **found})  # fmt: skip
    Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n" + format_table(Path(args.out)))


def format_table(path: Path) -> str:
    """Return one Markdown row per target and rule."""
    lines = [
        "| promised retention | rule | held on | 95 % interval | redrawn | kept | worst prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in map(json.loads, path.read_text().splitlines()):
        redrawn = "" if row["redrawn"] is None else f"{row['redrawn']:.1%}"
        lines.append(
            f"| {row['target']:.2f} | {row['rule']} | {row['covered']:.1%} of {row['n']} | {row['low']:.1%} to "
            f"{row['high']:.1%} | {redrawn} | {row['kept']:.1%} | {row['worst']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
