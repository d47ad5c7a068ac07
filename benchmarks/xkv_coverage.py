"""Does a promised retention hold on prompts that were never seen? The paper's rule beside a conformal margin.

    python benchmarks/xkv_coverage.py

In: fresh held-out recall prompts of the demo model, of mixed lengths. Out: a JSON line per target and rule: how many
of the test prompts kept the retention that was promised, with an exact (Clopper-Pearson) 95 % interval, and how much
was kept. The calibration prompts are drawn like the test prompts; a last row per target calibrates on the shipped
profile instead, whose prompts are of other files and names. The promise is about the draw of calibration and test
prompts together, so `redrawn` is the mean coverage when the same prompts are split anew 200 times.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from demo_texts import Demo, digest
from rows import RESULTS, Row, format_rows, read_rows
from runs import Recorder, make_parser
from scipy.stats import beta

import farkv
from farkv import Profile, allocate
from farkv.calibrate.conformal import allocate_promise, average_allocations
from farkv.calibrate.curves import GRID, Curves
from farkv.demo import MODEL_PATH
from farkv.math.allocate import measure_retention
from farkv.measure.mini import Light

SEED = 8_200_000
FACTS = 30
SHORTEST, LONGEST = 1024, 4096
TARGETS = (0.8, 0.9, 0.95)
CONFIDENCE = 0.9


def share_plans(fit: Curves, calibration: Curves, target: float) -> dict[str, np.ndarray]:
    """Return cells per layer of every rule, all from the same prompts."""
    both = np.concatenate([fit.keep.numpy(), calibration.keep.numpy()])
    promise = allocate_promise(fit.keep.numpy(), calibration.keep.numpy(), retention=target, confidence=CONFIDENCE)
    return {
        "conformal margin": promise.tokens,
        "paper: mean of the samples' allocations": average_allocations(both, retention=target),
        "mean curve": allocate(both.mean(0), retention=target),
    }


def judge(cells: np.ndarray, tests: np.ndarray, target: float) -> Row:
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
    cumulative = tests.cumsum(-1, dtype=np.float64)
    at = np.arange(tests.shape[1])
    covered = {}
    for name, cells in share_plans(fit, calibration, target).items():
        held = (cumulative[:, at, np.maximum(cells, 1) - 1] * (cells > 0) / cumulative[..., -1]).mean(-1)
        covered[name] = float((held >= target).mean())
    return covered


def format_table(path: Path = RESULTS / "xkv_coverage.jsonl") -> str:
    """Return one Markdown row per target and rule."""
    head = ["promised retention", "rule", "held on", "95 % interval", "redrawn", "kept", "worst prompt"]
    lines = []
    for r in read_rows(path):
        redrawn = "" if r["redrawn"] is None else f"{r['redrawn']:.1%}"
        cells = [f"{r['target']:.2f}", r["rule"], f"{r['covered']:.1%} of {r['n']}"]
        cells += [f"{r['low']:.1%} to {r['high']:.1%}", redrawn, f"{r['kept']:.1%}", f"{r['worst']:.3f}"]
        lines.append(cells)
    return format_rows(head, lines)


def main() -> None:
    """Measure the prompts' curves once (resumable), then judge every rule on the same test prompts."""
    parser = make_parser(__doc__, "xkv_coverage.jsonl")
    parser.add_argument("--tests", default=300, type=int)
    parser.add_argument("--samples", default=120, type=int, help="fit and calibration together")
    parser.add_argument("--redraws", default=200, type=int)
    run, demo, lengths = Recorder(parser), Demo(), random.Random(SEED)
    n_samples, n = run.args.samples, run.args.tests + run.args.samples
    prompts = demo.make_asked([(lengths.randint(SHORTEST, LONGEST), SEED + i) for i in range(n)], FACTS)
    Path("runs").mkdir(exist_ok=True)
    keep = farkv.profile(
        demo.model, prompts, light=Light(1.0, 1), resume=Path("runs/xkv_coverage.part"),
        on_prompt=lambda done, total: run.say(f"{done}/{total}"),
    ).curves()  # fmt: skip
    samples, tests = keep.take(range(n_samples)), keep.take(range(n_samples, n))
    rng = np.random.default_rng(SEED)
    redraws = [rng.permutation(n) for _ in range(run.args.redraws)]
    shipped = Profile.load(MODEL_PATH / "profile.safetensors").curves().split(0.5)
    for target in TARGETS:
        again = [judge_redraw(keep, order, n_samples, target) for order in redraws]
        plans = share_plans(*samples.split(0.5), target)
        plans["conformal, shipped profile"] = share_plans(*shipped, target)["conformal margin"]
        for name, cells in plans.items():
            redrawn = float(np.mean([held[name] for held in again])) if name in again[0] else None
            run.write(dict(target=target, rule=name, confidence=CONFIDENCE, prompts_sha=digest(json.dumps(prompts)),
                           redrawn=redrawn, **judge(cells, tests.keep.numpy(), target)))  # fmt: skip
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
