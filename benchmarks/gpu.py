"""What farkv does on a GPU, in one table and one JSON line. It needs an NVIDIA GPU; `benchmarks/gpu.sh` sets it up.

    python benchmarks/gpu.py --out benchmarks/results/gpu.jsonl --picture docs/overlap.png
    python benchmarks/gpu.py --smoke        # tiny sizes on a CPU, kernels in Triton's interpreter: no figure means much

In: nothing but options. Out: kernel times beside the floors of memory and link; Llama-3-8B's shape at 128 K tokens with
10 % of its KV bytes near, against Hugging Face's offloaded cache and a cache resident on the GPU, batch 1 to 16; OPT's
shape at 2 K tokens, batch 4 to 20, beside the paper's; bytes over the link; the timeline of one step. A part that no
longer fits into the time is named, not run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# Whether Triton interprets is decided when it is imported.
if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_kernels import count_crossed, make_layer, measure_bandwidth, measure_kernels
from gpu_models import OFFLOADED, RESIDENT, Task, measure_task

from farkv.bench.e2e import ModelSettings
from farkv.bench.fill import find_available_bytes
from farkv.bench.models import make_model
from farkv.bench.report import OURS
from farkv.bench.shapes import ModelShape, find_shape
from farkv.kernels.gpu import Blocks, Gpu

TINY = {
    "llama3-8b": ModelShape("llama3-8b", "llama", 2, 64, 4, 2, 16, 128),
    "opt-6.7b": ModelShape("opt-6.7b", "opt", 2, 64, 4, 4, 16, 128),
}
# What InfiniGen's paper reports of the next larger model: 1920 + 128 tokens, one 48 GB GPU on PCIe 3. Figure 14: times
# that InfiniGen is faster than others.
PAPER = {
    "OPT-13B, figure 15, tokens/s at batch 4": {"InfiniGen": 27.36, "H2O": 21.31, "INT4": 12.22},
    "OPT-13B, figure 15, tokens/s at batch 20": {"InfiniGen": 41.99, "H2O": 25.7, "INT4": 14.02},
    "OPT-13B, figure 14, times faster at batch 20": {"UVM": 32.93, "H2O": 1.63},
}


class Clock:
    """Says what of the time is left."""

    def __init__(self, budget_s: float):
        self.stop, self.left_out = time.monotonic() + budget_s, []

    def allows(self, name: str, seconds: float) -> bool:
        """Return whether a part that takes about this long still fits; note it where it does not."""
        if time.monotonic() + seconds <= self.stop:
            return True
        self.left_out.append(f"time: {name}")
        return False


def run_kernels(device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Measure the kernels on one layer."""
    shape = TINY["llama3-8b"] if smoke else find_shape("llama3-8b")
    blocks = Blocks(select=128, attend=16, gather=16, programs=3)
    kernels = Gpu(blocks, interpreted=True) if smoke else Gpu()
    layer = make_layer(shape, 256 if smoke else 131072, 0.05, device)
    speeds = measure_bandwidth(kernels, layer)
    return {"bandwidth": speeds, "kernels": measure_kernels(kernels, layer, speeds),
            "crossed": count_crossed(kernels, layer)}  # fmt: skip


def plan_tasks(*, smoke: bool) -> dict[str, list[Task]]:
    """Return the models' measurements by shape, the most important first."""
    methods = (OURS, RESIDENT) if smoke else (OURS, OFFLOADED, RESIDENT)
    llama = TINY["llama3-8b"] if smoke else find_shape("llama3-8b")
    opt = TINY["opt-6.7b"] if smoke else find_shape("opt-6.7b")
    long, short, layers = (512, 256, 2) if smoke else (131072, 2048, 3)
    base = ModelSettings(llama, (long,), layers, fraction=0.05, rounds=1 if smoke else 7)
    small = replace(base, shape=opt, contexts=(short,), fraction=0.1)
    batches = ((1, 2), (2,)) if smoke else ((1, 4, 8, 16), (4, 8, 12, 16, 20))
    share = 0.9 if smoke else 0.1
    # At 2 K tokens the window and the index weigh more.
    return {
        "llama": [Task(replace(base, batch=b), long, share, methods) for b in batches[0]],
        "opt": [Task(replace(small, batch=b), short, 0.9 if smoke else 0.3, methods) for b in batches[1]],
    }


def run_models(device: torch.device, clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure whole models: every task that the time allows."""
    rows = []
    for tasks in plan_tasks(smoke=args.smoke).values():
        settings, longest = tasks[0].settings, max(t.context for t in tasks)
        model = make_model(settings.shape, settings.layers, longest + 1024, torch.bfloat16).to(device)
        for i, task in enumerate(tasks):
            # Filling three caches and a few slow steps: some seconds per GiB.
            seconds = 0 if args.smoke else 10 + 4 * task.kv_bytes / 2**30
            name = f"{settings.shape.name}, batch {task.settings.batch}"
            # Pinned memory comes in powers of two, and Hugging Face's cache is in host memory too.
            if 3 * task.kv_bytes > find_available_bytes():
                clock.left_out.append(f"host memory: {name}")
            elif clock.allows(name, seconds):
                first = i == 0 and settings.shape.family == "llama"
                rows += measure_task(task, model, args.picture if first else None)
        del model
    return rows


def compare(rows: list[dict[str, Any]], link: float) -> list[str]:
    """Return a Markdown row per shape and batch; `link` is bytes per second of rows from pinned memory."""
    head = ("shape", "tokens", "batch", "farkv", "offloaded", "resident", "offloaded / farkv", "farkv / resident",
            "link MB/token", "predicted, nothing near", "% of the link's floor")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((r["shape"], r["context"], r["batch"]) for r in rows):
        found = {r["method"]: r for r in rows if (r["shape"], r["context"], r["batch"]) == key}
        ms = {name: row.get("ms_per_layer") for name, row in found.items()}
        ours, off, near = (ms.get(name) for name in (OURS, OFFLOADED, RESIDENT))
        cells = [*map(str, key), *(f"{t:.3f} ms" if t else "–" for t in (ours, off, near))]
        cells += [f"{a / b:.2f}" if a and b else "–" for a, b in ((off, ours), (ours, near))]
        for name in ("link_bytes_counted", "link_bytes_predicted"):
            n_bytes = found.get(OURS, {}).get(name)
            cells.append("–" if n_bytes is None else f"{n_bytes / 1e6:.2f}")
        row = found.get(OURS, {})
        cells.append(f"{100 * row['link_bytes_counted'] / link / (1e-3 * ours * row['layers']):.0f}" if ours else "–")
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["shape"].startswith("opt") and "ms_per_layer" in row:
            seconds = 1e-3 * row["ms_per_layer"] * find_shape(row["shape"]).layers
            speed = row["batch"] / seconds
            lines.append(f"{row['method']}, {row['shape']}, batch {row['batch']}: {speed:.1f} tokens/s of all layers")
    lines += [f"{r['method']} at batch {r['batch']} was refused: {r['refused']}" for r in rows if "refused" in r]
    return lines


def format_table(result: dict[str, Any]) -> str:
    """Return everything that was measured, for people."""
    lines = [f"device: {result['device']}; torch {torch.__version__}", ""]
    for name, speed in result["bandwidth"].items():
        lines.append(f"{name.replace('_', ', in ')}: {speed / 1e9:.1f} GB/s")
    lines += ["", "| kernel | µs | MB | floor | % of it |", "|---|---|---|---|---|"]
    for row in result["kernels"]:
        lines.append(f"| {row['kernel']} | {row['us']:.1f} | {row['bytes'] / 1e6:.2f} | {row['floor']} | "
                     f"{row['floor_percent']:.0f} |")  # fmt: skip
    crossed = result["crossed"]
    lines += [f"bytes over the link: {crossed['predicted']} predicted, {crossed['counted']} counted on the device", ""]
    lines += compare(result["models"], result["bandwidth"]["link_rows"])
    lines += [f"{name}: {values}" for name, values in PAPER.items()]
    lines += [f"left out for want of {name}" for name in result["left_out"]]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: does it run at all?")
    parser.add_argument("--budget", type=float, default=330, help="seconds that may be spent")
    parser.add_argument("--picture", type=Path, default=Path("gpu_timeline.png"), help="the timeline of one step")
    parser.add_argument("--out", type=Path, help="file to which the JSON line is added")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device; run it on a machine with an NVIDIA GPU, or give --smoke")
    device, clock = torch.device("cpu" if args.smoke else "cuda"), Clock(args.budget)
    torch.manual_seed(0)
    with torch.no_grad():
        result = {"device": "cpu, interpreted" if args.smoke else torch.cuda.get_device_name()}
        result |= run_kernels(device, smoke=args.smoke)
        result["models"] = run_models(device, clock, args)
    result |= {"left_out": clock.left_out, "paper": PAPER, "smoke": args.smoke}
    print(format_table(result))
    line = json.dumps(result)
    print(line)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
