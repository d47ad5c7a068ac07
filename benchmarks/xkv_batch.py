"""How many sequences fit a memory limit, and how fast are they decoded? Full cache against XKV's `keep`, measured.

    python benchmarks/xkv_batch.py --threads 1 --out benchmarks/results/xkv_batch.jsonl
    python benchmarks/xkv_batch.py --contexts 256 --sequences 3 --steps 4 --out /tmp/small.jsonl

In: a random model (8 layers, hidden size 256, 4 query and 2 KV heads of 64, MLP 512, vocabulary 1024, float32), batches
of equally long random prompts, and a host limit in which the full cache of 8 sequences fits exactly. Out: a JSON line
per context, method and batch. Every method runs at the largest batch that `new_cache(tokens, batch)` admits (one more
is refused) and that is then read and decoded to the end, and at the full cache's batch where it may. Decoding is timed
`--repeats` times in turns, all methods' caches side by side, so that a busy machine is busy for all; the median counts.
The receipt's peak is asserted to be within the limit.

The baseline is this library's own full cache, which stores the model's KV heads as they are. The XKV paper derives its
5.2 to 5.5 times from 2.11 x 20 / 8 and against a cache inflated to the query heads (4 times); nothing here is derived.
Without a plan every layer of the prompt is stored before the first is evicted, so the batch is one that fits whole:
XKV alone saves no room for prompts. `floor_s` is what a step would take if it did nothing but read its bytes (weights
and kept records) at the speed that summing a large tensor reads at here; the gap to the measured time is computation
and the Python of 8 layers, which a small model pays for dearly.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import farkv
from farkv.calibrate.plan import Allocation, Plan
from farkv.errors import CapacityError
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model

LAYERS = 8
KV_HEADS = 2
HEAD_DIM = 64
VOCABULARY = 1024
SEED = 6
# Name: mean share, and whether a plan says so.
METHODS: dict[str, tuple[float, bool]] = {
    "full": (1.0, False),
    "keep 0.384, plan": (0.384, True),
    "keep 0.2, plan": (0.2, True),
    "keep 0.384, no plan": (0.384, False),
}
MOST = 512


class Run(NamedTuple):
    """One method at one batch, its prompts read."""

    name: str
    batch: int
    refused_at: int
    far: Handle
    cache: FarCache
    seconds: list[float]


def make_model() -> LlamaForCausalLM:
    """Make the random model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=512,
        vocab_size=VOCABULARY,
        max_position_embeddings=16384,
    )
    return LlamaForCausalLM(config).eval()


def make_plan(model: Any, mean: float) -> Plan:
    """Make a plan by hand: the first layer keeps 1.5 times the mean, the last half of it."""
    shares = tuple(mean * (1.5 - i / (LAYERS - 1)) for i in range(LAYERS))
    zeros = (0.0,) * LAYERS
    keep = Allocation(shares, 0, "uniform", {"ratio": mean}, zeros, zeros)
    return Plan(identify_model(model), tuple(range(LAYERS)), {"keep": keep})


def attach(model: Any, name: str, limit: int) -> Handle:
    """Attach a method under the limit."""
    mean, planned = METHODS[name]
    if name == "full":
        return farkv.attach(model, farkv.Full(), host=limit)
    if planned:
        return farkv.attach(model, farkv.XKV(), host=limit, plan=make_plan(model, mean))
    return farkv.attach(model, farkv.XKV(fraction=mean), host=limit)


def find_batch(far: Handle, tokens: int) -> int:
    """Return the largest batch that is admitted; the next is refused."""
    for batch in range(1, MOST):
        try:
            far.new_cache(tokens=tokens, batch=batch)
        except CapacityError:
            return batch - 1
    raise SystemExit(f"no batch up to {MOST} was refused")


@torch.no_grad()
def read_prompts(far: Handle, batch: int, context: int, tokens: int) -> FarCache:
    """Read a batch of random prompts in one pass."""
    torch.manual_seed(batch)
    cache = far.new_cache(tokens=tokens, batch=batch)
    far.decoder(input_ids=torch.randint(VOCABULARY, (batch, context)), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def decode(run: Run, steps: int) -> float:
    """Decode greedily; return seconds."""
    token = torch.zeros(run.batch, 1, dtype=torch.long)
    started = time.perf_counter()
    for _ in range(steps):
        token = run.far.model(input_ids=token, past_key_values=run.cache, use_cache=True).logits[:, -1:].argmax(-1)
    return time.perf_counter() - started


def measure_bandwidth() -> float:
    """Return the bytes per second at which a large tensor is summed."""
    large = torch.ones(64 * 2**20)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        large.sum()
        times.append(time.perf_counter() - started)
    return large.numel() * large.element_size() / min(times)


def prepare(name: str, limit: int, args: argparse.Namespace, context: int, also: int) -> list[Run]:
    """Read the prompts of a method at its largest batch that runs and, where it may, at another."""
    tokens = context + args.repeats * args.steps + 1
    far = attach(make_model(), name, limit)
    admitted = batch = find_batch(far, tokens)
    runs: list[Run] = []
    while batch > 0 and not runs:
        try:
            run = Run(name, batch, batch + 1, far, read_prompts(far, batch, context, tokens), [])
            decode(run, 1)
            runs.append(run)
        except CapacityError as error:
            print(f"{name}: batch {batch} was admitted and did not run: {error}", flush=True)
            batch -= 1
    print(f"{context}: {name}: {admitted} sequences admitted, {batch} run", flush=True)
    if also and also < batch:
        run = Run(name, also, batch + 1, far, read_prompts(far, also, context, tokens), [])
        decode(run, 1)
        runs.append(run)
    return runs


def run_context(args: argparse.Namespace, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Run all methods at one context, decoding in turns."""
    tokens = context + args.repeats * args.steps + 1
    token_bytes = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
    limit = args.sequences * tokens * token_bytes
    runs: list[Run] = []
    for name in METHODS:
        runs += prepare(name, limit, args, context, runs[0].batch if runs else 0)
    for _ in range(args.repeats):
        for run in runs:
            run.seconds.append(decode(run, args.steps))
    rows = []
    for run in runs:
        receipt = run.far.receipt(run.cache)
        peak = receipt.kv_bytes.host_peak
        assert peak <= limit, (run.name, peak, limit)
        seconds = statistics.median(run.seconds) / args.steps
        weights = sum(p.numel() * p.element_size() for p in run.far.model.parameters())
        embedding = run.far.model.get_input_embeddings().weight
        read = weights - embedding.numel() * embedding.element_size()
        read += int(receipt.kept_fraction * receipt.kv_bytes.total)
        rows.append(
            dict(method=run.name, context=context, new_tokens=tokens - context, batch=run.batch, limit=limit,
                 largest=run.refused_at == run.batch + 1, refused_at=run.refused_at, peak=peak,
                 kept_fraction=receipt.kept_fraction, step_s=seconds, steps=args.steps, seconds=run.seconds,
                 tokens_per_s=run.batch / seconds, bytes_per_step=read, bytes_per_s=read / seconds,
                 floor_s=read / bandwidth, bandwidth=bandwidth, threads=args.threads,
                 versions={"torch": torch.__version__, "python": platform.python_version()})
        )  # fmt: skip
    return rows


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/xkv_batch.jsonl")
    parser.add_argument("--contexts", default="2048,4096", help="tokens of a prompt, by commas")
    parser.add_argument("--sequences", default=8, type=int, help="full caches that the limit holds")
    parser.add_argument("--steps", default=32, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--threads", default=2, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = measure_bandwidth()
    out = Path(args.out)
    out.write_text("")
    for context in map(int, args.contexts.split(",")):
        rows = run_context(args, context, bandwidth)
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(format_table(out))


def format_table(path: Path) -> str:
    """Return one Markdown row per context, method and batch, beside the full cache's run of that context."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| context | method | sequences | peak, of the limit | tokens/s, all sequences | of full's (each round) | "
        "ms per step (bytes read alone) | GB/s |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        full = next(r for r in rows if r["method"] == "full" and r["context"] == row["context"])
        cells = [f"{row['context']:,}", row["method"], f"{row['batch']}{' (largest)' if row['largest'] else ''}"]
        cells += [f"{row['peak'] / row['limit']:.1%}", f"{row['tokens_per_s']:.1f}"]
        gains = [row["batch"] * f / s / full["batch"] for s, f in zip(row["seconds"], full["seconds"], strict=True)]
        cells += [f"{row['tokens_per_s'] / full['tokens_per_s']:.2f} ({min(gains):.2f}–{max(gains):.2f})"]
        cells += [f"{1000 * row['step_s']:.1f} ({1000 * row['floor_s']:.1f})", f"{row['bytes_per_s'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
