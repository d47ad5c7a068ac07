"""What farkv does on a GPU, in one table and one JSON line. It needs an NVIDIA GPU; `benchmarks/gpu.sh` sets it up.

    python benchmarks/gpu.py --out benchmarks/results/gpu.jsonl --trace step.json
    python benchmarks/gpu.py --smoke        # tiny sizes on a CPU, kernels in Triton's interpreter: no figure means much

In: nothing but options. Out: kernel times beside the floors of memory and link; Llama-3-8B's shape at 128 K tokens with
10 % of its KV bytes near, against Hugging Face's offloaded cache and a cache resident on the GPU, batch 1 to 16; OPT's
shape at 2 K tokens, batch 4 to 20, beside the paper's; bytes over the link; how much of a step's copying is hidden. A
part that no longer fits into the time is named, not run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

# Whether Triton interprets is decided when it is imported.
if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_kernels import make_layer, measure_kernels
from gpu_models import OFFLOADED, RESIDENT, Task, measure_task
from rows import RESULTS, Row, Rows, format_rows, group
from runs import make_parser

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


def run_kernels(device: torch.device, *, smoke: bool) -> Row:
    """Measure the kernels on one layer."""
    shape = TINY["llama3-8b"] if smoke else find_shape("llama3-8b")
    kernels = Gpu(Blocks(select=128, attend=16, gather=16, programs=3), interpreted=True) if smoke else Gpu()
    return measure_kernels(kernels, make_layer(shape, 256 if smoke else 131072, 0.05, device))


def plan_tasks(*, smoke: bool) -> list[list[Task]]:
    """Return each shape's measurements, the most important first."""
    methods = (OURS, RESIDENT) if smoke else (OURS, OFFLOADED, RESIDENT)
    llama = TINY["llama3-8b"] if smoke else find_shape("llama3-8b")
    opt = TINY["opt-6.7b"] if smoke else find_shape("opt-6.7b")
    long, short, layers = (512, 256, 2) if smoke else (131072, 2048, 3)
    base = ModelSettings(llama, (long,), layers, fraction=0.05, rounds=1 if smoke else 7)
    small = replace(base, shape=opt, contexts=(short,), fraction=0.1)
    batches = ((1, 2), (2,)) if smoke else ((1, 4, 8, 16), (4, 8, 12, 16, 20))
    share = 0.9 if smoke else 0.1
    # At 2 K tokens the window and the index weigh more.
    return [
        [Task(replace(base, batch=b), long, share, methods) for b in batches[0]],
        [Task(replace(small, batch=b), short, 0.9 if smoke else 0.3, methods) for b in batches[1]],
    ]


def run_models(device: torch.device, stop: float, trace: Path, *, smoke: bool) -> tuple[Rows, list[str]]:
    """Measure whole models: every task that memory and the time until `stop` allow; name what was left out."""
    rows, left_out = [], []
    for tasks in plan_tasks(smoke=smoke):
        settings, longest = tasks[0].settings, max(t.context for t in tasks)
        model = make_model(settings.shape, settings.layers, longest + 1024, torch.bfloat16).to(device)
        for i, task in enumerate(tasks):
            # Filling three caches and a few slow steps: some seconds per GiB.
            seconds = 0 if smoke else 10 + 4 * task.kv_bytes / 2**30
            name = f"{settings.shape.name}, batch {task.settings.batch}"
            # Pinned memory comes in powers of two, and Hugging Face's cache is in host memory too.
            if 3 * task.kv_bytes > find_available_bytes():
                left_out.append(f"host memory: {name}")
            elif time.monotonic() + seconds > stop:
                left_out.append(f"time: {name}")
            else:
                rows += measure_task(task, model, trace if i == 0 and settings.shape.family == "llama" else None)
        del model
    return rows, left_out


def compare(rows: Rows, link: float) -> str:
    """Return a Markdown row per shape and batch; `link` is bytes per second of rows from pinned memory."""
    head = ("shape", "tokens", "batch", "farkv", "offloaded", "resident", "offloaded / farkv", "farkv / resident",
            "link MB/token", "predicted, nothing near", "% of the link's floor")  # fmt: skip
    lines, notes = [], []
    for key, mine in group(rows, "shape", "context", "batch").items():
        found = {r["method"]: r for r in mine}
        ours, off, near = (found.get(name, {}).get("ms_per_layer") for name in (OURS, OFFLOADED, RESIDENT))
        row = found.get(OURS, {})
        moved = [row.get(name) for name in ("link_bytes_counted", "link_bytes_predicted")]
        cells = [*key, *(f"{t:.3f} ms" if t else "–" for t in (ours, off, near))]
        cells += [f"{a / b:.2f}" if a and b else "–" for a, b in ((off, ours), (ours, near))]
        cells += ["–" if n is None else f"{n / 1e6:.2f}" for n in moved]
        lines.append([*cells, f"{100 * moved[0] / link / (1e-3 * ours * row['layers']):.0f}" if ours else "–"])
    for r in rows:
        if "refused" in r:
            notes.append(f"{r['method']} at batch {r['batch']} was refused: {r['refused']}")
        elif r["shape"].startswith("opt"):
            speed = r["batch"] / (1e-3 * r["ms_per_layer"] * find_shape(r["shape"]).layers)
            notes.append(f"{r['method']}, {r['shape']}, batch {r['batch']}: {speed:.1f} tokens/s of all layers")
        if "timeline" in r:
            notes.append(f"copying {r['timeline']['copy_us']:.0f} µs, {r['timeline']['hidden_share']:.0%} of it hidden")
    return format_rows(head, lines, *notes)


def format_published() -> str:
    """Return the table of docs/speed.md: the newest line of the results."""
    return format_measured(json.loads((RESULTS / "gpu.jsonl").read_text().splitlines()[-1]))


def format_measured(result: Row) -> str:
    """Return kernel times beside their floors, and whole models."""
    crossed, speeds = result["crossed"], result["bandwidth"]
    kernels = (
        [r["kernel"], f"{r['us']:.1f}", f"{r['bytes'] / 1e6:.2f}", r["floor"], f"{r['floor_percent']:.0f}"]
        for r in result["kernels"]
    )
    floors = "; ".join(f"{name.replace('_', ', in ')}: {speed / 1e9:.1f} GB/s" for name, speed in speeds.items())
    return "\n".join([
        f"{result['device']}, torch {result['torch']}. {floors}\n",
        format_rows(["kernel", "µs", "MB", "floor", "% of it"], kernels),
        f"\nbytes over the link: {crossed['predicted']} predicted, {crossed['counted']} counted on the device\n",
        compare(result["models"], speeds["link_rows"]),
    ])  # fmt: skip


def format_table(result: Row) -> str:
    """Return everything that was measured, for people."""
    return "\n".join([
        format_measured(result),
        *(f"{name}: {values}" for name, values in PAPER.items()),
        *(f"left out for want of {name}" for name in result["left_out"]),
    ])  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: does it run at all?")
    parser.add_argument("--budget", type=float, default=330, help="seconds that may be spent")
    parser.add_argument("--trace", type=Path, default=Path("gpu_step.json"), help="the trace of one step")
    parser.add_argument("--out", type=Path, help="file to which the JSON line is added")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device; run it on a machine with an NVIDIA GPU, or give --smoke")
    device, stop = torch.device("cpu" if args.smoke else "cuda"), time.monotonic() + args.budget
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        result: Row = {"device": "cpu, interpreted" if args.smoke else torch.cuda.get_device_name()}
        result["torch"] = torch.__version__
        result |= run_kernels(device, smoke=args.smoke)
        result["models"], result["left_out"] = run_models(device, stop, args.trace, smoke=args.smoke)
    line = json.dumps(result | {"paper": PAPER, "smoke": args.smoke})
    print(format_table(result), line, sep="\n")
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
