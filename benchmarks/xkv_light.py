"""What does a lighter mini-inference cost in accuracy? `Light` against the full pass, on the demo model.

    python benchmarks/xkv_light.py

In: held-out recall prompts that end with their question. Out: a JSON line per variant: its time beside the full
pass's (interleaved, medians), the mean absolute difference of the mean cumulative curves, and, at each budget, the
retention on the full curves of the allocation that it leads to, beside that of the full curves' own allocation and of
an equal split.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from demo_texts import Demo, digest
from rows import RESULTS, Row, format_rows, read_rows
from runs import Recorder, make_parser, time_call

import farkv
from farkv import allocate
from farkv.calibrate.curves import Curves
from farkv.math.allocate import measure_retention
from farkv.measure.mini import Light

LENGTHS = (1024, 2048, 4096, 6144)
FACTS = 30
SEED = 7_150_000
RATIOS = (0.1, 0.2, 0.4)
VARIANTS = [Light(tokens, layers) for layers in (1, 2) for tokens in (0.25, 0.5, 1.0)]
WHO = ("full", "light", "uniform")


def compare(full: list[Curves], light: list[Curves]) -> Row:
    """Return the errors of curves averaged over prompts, and what allocations made of them retain."""
    row: Row = {}
    for kind in ("keep", "spread"):
        a, b = (torch.cat([getattr(curves, kind) for curves in some]) for some in (full, light))
        gap = (a.mean(0).cumsum(-1) - b.mean(0).cumsum(-1)).abs()
        row[f"{kind}_error"] = float(gap.mean())
        row[f"{kind}_error_worst_layer"] = float(gap.mean(-1).max())
        row[f"{kind}_error_one_prompt"] = float((a.cumsum(-1) - b.cumsum(-1)).abs().mean())
    means = [torch.cat([c.keep for c in some]).mean(0).sort(-1, descending=True).values for some in (full, light)]
    guesses = [guess.numpy() for guess in (*means, torch.full_like(means[0], 1 / means[0].shape[1]))]
    row["retention"] = {
        str(ratio): {
            who: measure_retention(guesses[0], allocate(guess, ratio=ratio))
            for who, guess in zip(WHO, guesses, strict=True)
        }
        for ratio in RATIOS
    }
    return row


def format_table(path: Path = RESULTS / "xkv_light.jsonl") -> str:
    """Return one Markdown row per variant: time, error of the curves, loss of retention and what there was to lose."""
    rows = read_rows(path)
    head = ["tokens", "every n-th block", "time, of the full pass", "error of the curves", "error of one prompt's"]
    head += [f"retention at {float(budget):.0%}: full, light, uniform" for budget in rows[0]["retention"]]
    return format_rows(
        head,
        ([f"{r['tokens']:.0%}", r["layers"], f"{r['seconds_ratio']:.2f}", f"{r['keep_error']:.3f}",
          f"{r['keep_error_one_prompt']:.3f}",
          *(", ".join(f"{found[who]:.4f}" for who in WHO) for found in r["retention"].values())] for r in rows),
    )  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "xkv_light.jsonl")
    parser.add_argument("-n", default=16, type=int)
    run, demo = Recorder(parser), Demo()
    prompts = demo.make_asked([(LENGTHS[i % len(LENGTHS)], SEED + i) for i in range(run.args.n)], FACTS)
    # Curves alone, as a light pass measures them: the price of the skew is not the full pass's fault.
    variants: dict[Light | None, Light] = {None: Light(1.0, 1)} | {variant: variant for variant in VARIANTS}
    found: dict[Light | None, list[tuple[float, Curves]]] = {variant: [] for variant in variants}
    farkv.profile(demo.model, prompts[:1], light=variants[None])
    for i, prompt in enumerate(prompts):
        for variant, light in variants.items():
            seconds, profile = time_call(lambda p=prompt, s=light: farkv.profile(demo.model, [p], light=s))
            found[variant].append((seconds, profile.curves()))
        run.say(f"{i + 1}/{len(prompts)}")
    full = [curves for _, curves in found[None]]
    for variant in VARIANTS:
        ratios = [s / s0 for (s, _), (s0, _) in zip(found[variant], found[None], strict=True)]
        run.write(dict(tokens=variant.tokens, layers=variant.layers, prompts_sha=digest(json.dumps(prompts)),
                       n=len(full), seconds_ratio=statistics.median(ratios),
                       **compare(full, [curves for _, curves in found[variant]])))  # fmt: skip
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
