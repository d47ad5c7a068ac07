"""How many sequences fit a memory limit, and how fast are they decoded? Full cache against XKV's `keep`, measured.

    python benchmarks/xkv_batch.py --threads 1
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
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_models import make_keep_plan, make_llama
from rows import RESULTS, Row, Rows, format_rows, read_rows
from runs import Recorder, find_versions, make_parser, read_numbers, time_call

import farkv
from farkv.errors import CapacityError
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle

SHAPE = dict(layers=8, heads=4, kv_heads=2, head_dim=64, hidden=256, mlp=512, vocabulary=1024)
TOKEN_BYTES = SHAPE["layers"] * SHAPE["kv_heads"] * 2 * SHAPE["head_dim"] * 4
# Name: mean share, and whether a plan says so.
METHODS: dict[str, tuple[float, bool]] = {
    "full": (1.0, False),
    "keep 0.384, plan": (0.384, True),
    "keep 0.2, plan": (0.2, True),
    "keep 0.384, no plan": (0.384, False),
}
MOST = 512


class Arm(NamedTuple):
    """One method at one batch, its prompts read."""

    name: str
    batch: int
    refused_at: int
    far: Handle
    cache: FarCache
    seconds: list[float]

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Decode greedily."""
        token = torch.zeros(self.batch, 1, dtype=torch.long)
        for _ in range(steps):
            logits = self.far.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)


def attach(model: Any, name: str, limit: int) -> Handle:
    """Attach a method under the limit."""
    mean, planned = METHODS[name]
    if name == "full":
        return farkv.attach(model, farkv.Full(), host=limit)
    if planned:
        return farkv.attach(model, farkv.XKV(), host=limit, plan=make_keep_plan(model, mean))
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
    ids = torch.randint(SHAPE["vocabulary"], (batch, context))
    far.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def prepare(run: Recorder, name: str, limit: int, context: int, also: int) -> list[Arm]:
    """Read the prompts of a method at its largest batch that runs and, where it may, at another."""
    tokens = context + run.args.repeats * run.args.steps + 1
    far = attach(make_llama(16384, seed=6, **SHAPE), name, limit)
    admitted = largest = find_batch(far, tokens)

    def start(batch: int) -> Arm:
        arm = Arm(name, batch, largest + 1, far, read_prompts(far, batch, context, tokens), [])
        arm.decode(1)
        return arm

    arms: list[Arm] = []
    while largest > 0 and not arms:
        try:
            arms.append(start(largest))
        except CapacityError as error:
            run.say(f"{name}: batch {largest} was admitted and did not run: {error}")
            largest -= 1
    run.say(f"{context}: {name}: {admitted} sequences admitted, {largest} run")
    return [*arms, start(also)] if 0 < also < largest else arms


def run_context(run: Recorder, context: int, bandwidth: float) -> Rows:
    """Run all methods at one context, decoding in turns."""
    args = run.args
    limit = args.sequences * (context + args.repeats * args.steps + 1) * TOKEN_BYTES
    arms: list[Arm] = []
    for name in METHODS:
        arms += prepare(run, name, limit, context, arms[0].batch if arms else 0)
    for _ in range(args.repeats):
        for arm in arms:
            arm.seconds.append(time_call(lambda a=arm: a.decode(args.steps))[0])
    return [make_row(arm, context, limit, bandwidth, args) for arm in arms]


def make_row(arm: Arm, context: int, limit: int, bandwidth: float, args: argparse.Namespace) -> Row:
    """Return what was measured of an arm, and what reading its bytes alone would take."""
    receipt, model = arm.far.receipt(arm.cache), arm.far.model
    peak, seconds = receipt.kv_bytes.host_peak, statistics.median(arm.seconds) / args.steps
    assert peak <= limit, (arm.name, peak, limit)
    embedding = model.get_input_embeddings().weight
    read = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    read += int(receipt.kept_fraction * receipt.kv_bytes.total)
    return dict(method=arm.name, context=context, new_tokens=args.repeats * args.steps + 1, batch=arm.batch,
                limit=limit, largest=arm.refused_at == arm.batch + 1, refused_at=arm.refused_at, peak=peak,
                kept_fraction=receipt.kept_fraction, step_s=seconds, steps=args.steps, seconds=arm.seconds,
                tokens_per_s=arm.batch / seconds, bytes_per_step=read, bytes_per_s=read / seconds,
                floor_s=read / bandwidth, bandwidth=bandwidth, threads=args.threads,
                versions=find_versions())  # fmt: skip


def format_table(path: Path = RESULTS / "xkv_batch.jsonl") -> str:
    """Return one Markdown row per context, method and batch, beside the full cache's run of that context."""
    rows, lines = read_rows(path), []
    for r in rows:
        full = next(row for row in rows if row["method"] == "full" and row["context"] == r["context"])
        gains = [r["batch"] * f / s / full["batch"] for s, f in zip(r["seconds"], full["seconds"], strict=True)]
        cells = [f"{r['context']:,}", r["method"], f"{r['batch']}{' (largest)' if r['largest'] else ''}"]
        cells += [f"{r['peak'] / r['limit']:.1%}", f"{r['tokens_per_s']:.1f}"]
        cells += [f"{r['tokens_per_s'] / full['tokens_per_s']:.2f} ({min(gains):.2f}–{max(gains):.2f})"]
        cells += [f"{1000 * r['step_s']:.1f} ({1000 * r['floor_s']:.1f})", f"{r['bytes_per_s'] / 1e9:.2f}"]
        lines.append(cells)
    head = ["context", "method", "sequences", "peak, of the limit", "tokens/s, all sequences"]
    return format_rows([*head, "of full's (each round)", "ms per step (bytes read alone)", "GB/s"], lines)


def main() -> None:
    parser = make_parser(__doc__, "xkv_batch.jsonl", threads=2)
    parser.add_argument("--contexts", default="2048,4096", type=read_numbers, help="tokens of a prompt, by commas")
    parser.add_argument("--sequences", default=8, type=int, help="full caches that the limit holds")
    parser.add_argument("--steps", default=32, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    run = Recorder(parser)
    large = torch.ones(64 * 2**20)
    bandwidth = large.numel() * large.element_size() / min(time_call(large.sum)[0] for _ in range(5))
    for context in run.args.contexts:
        run.write(*run_context(run, context, bandwidth))
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
