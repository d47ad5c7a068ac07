"""What does farkv cost per layer and step where there is nothing to win? Decode steps over a short context.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --models small --rounds 40

In: random models (`tiny`: 4 layers, hidden size 64; `small`: 16 layers, 256; `1b`: 4 layers of the shape of
Llama-3.2-1B), a context of 256 tokens. Out: a JSON line per model, dtype and way of running: microseconds per layer and
decode step, and how they divide. All ways run in turns in one process, a few steps each, on models that share their
weights:

    plain      Hugging Face's model and DynamicCache, nothing attached
    ordinary   attached, but run on a DynamicCache
    full       attached, `Full()`
    in place   attached, `InfiniGen()` without a near limit
    far        attached, `InfiniGen()` with one

Ratios and parts count the processor time of the thread that decodes, which a busy machine lengthens least; `wall` are
the same steps by the clock on the wall. Parts are measured in steps of their own, with a clock around each: a part is
the time inside it less the time in the parts inside that. `attention` is the model's own function on the records read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

import torch
from random_models import make_llama
from rows import RESULTS, Rows, format_rows, read_rows
from runs import Recorder, make_parser, read_names
from transformers import DynamicCache, LlamaForCausalLM

from farkv import Full, InfiniGen, attach
from farkv.bench.models import share_weights
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle

CONTEXT = 256
VOCAB = 512
SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(layers=4, heads=4, kv_heads=2, hidden=64, mlp=128, vocabulary=VOCAB),
    "small": dict(layers=16, heads=8, kv_heads=2, hidden=256, mlp=1024, vocabulary=VOCAB),
    "1b": dict(layers=4, heads=32, kv_heads=8, hidden=2048, mlp=8192, vocabulary=VOCAB),
}
PARTS = ("hooks", "pass", "estimate", "append", "engine", "store", "attention", "speculate")
# What is timed as which part; the calls of an engine and of its store are those of the cache that is decoded on.
TIMED = {
    "farkv.hf.lookahead.Lookahead._find_asker": "hooks",
    "farkv.hf.cache.FarCache.begin": "pass",
    "farkv.hf.cache.FarCache.end": "pass",
    "farkv.hf.verify.Verifier.before": "pass",
    "farkv.hf.verify.Verifier.after": "pass",
    "farkv.hf.query.Queries.estimate": "estimate",
    "farkv.hf.layer.FarLayer.update": "append",
    "farkv.hf.layer.FarLayer.attend": "engine",
    "farkv.hf.attention.OwnAttention.__call__": "attention",
}
TIMED_STORE = ("append", "fetch", "read", "read_all", "keys", "locate")


class Way(NamedTuple):
    """One way of running: a model, whose handle (if any), and the cache that it decodes on."""

    name: str
    model: Any
    far: Handle | None
    cache: Any


class Clock:
    """Times nested parts, each without those inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._undo: list[Callable[[], None]] = []

    def wrap(self, part: str, function: Any) -> Any:
        """Return a function that is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - started
                self.seconds[part] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed

    def put(self, owner: Any, name: str, part: str) -> None:
        """Time a method of a class or an object until `remove`."""
        had = vars(owner).get(name)
        self._undo.append(partial(delattr, owner, name) if had is None else partial(setattr, owner, name, had))
        setattr(owner, name, self.wrap(part, getattr(owner, name)))

    def put_hooks(self, module: torch.nn.Module) -> None:
        """Time a module's hooks."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                self._undo.append(partial(hooks.__setitem__, key, hook))
                hooks[key] = self.wrap("hooks", hook)

    def put_all(self, way: Way) -> None:
        """Time the parts of one way."""
        for path, part in TIMED.items():
            owner, _, name = path.rpartition(".")
            self.put(locate(owner), name, part)
        for module in way.model.modules():
            self.put_hooks(module)
        if isinstance(way.cache, FarCache):
            engine = way.cache.engine
            self.put(engine, "speculate", "speculate")
            for name in TIMED_STORE:
                self.put(engine.store, name, "store")

    def remove(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []


@torch.no_grad()
def make_ways(model: LlamaForCausalLM, prompt: torch.Tensor) -> list[Way]:
    """Return every way, its context read."""
    methods = {"ordinary": (InfiniGen(), None), "full": (Full(), None), "in place": (InfiniGen(), None),
               "far": (InfiniGen(), "1GiB")}  # fmt: skip
    ways = [Way("plain", model, None, DynamicCache(config=model.config))]
    for name, (method, near) in methods.items():
        twin = share_weights(model)
        far = attach(twin, method, near=near, profile=False)
        cache = DynamicCache(config=model.config) if name == "ordinary" else far.new_cache()
        ways.append(Way(name, twin, far, cache))
    for way in ways:
        way.model(input_ids=prompt, past_key_values=way.cache, use_cache=True)
    return ways


@torch.no_grad()
def decode(way: Way, steps: int) -> tuple[float, float]:
    """Return the seconds of a decode step, the least of a few: of this thread, and by the clock on the wall."""
    own, wall = [], []
    token = torch.tensor([[7]])
    for _ in range(steps):
        started, started_wall = time.thread_time(), time.perf_counter()
        way.model(input_ids=token, past_key_values=way.cache, use_cache=True)
        own.append(time.thread_time() - started)
        wall.append(time.perf_counter() - started_wall)
    return min(own), min(wall)


def run_rounds(ways: list[Way], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return every round's seconds of a step, and of its parts, by way."""
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    parts: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for i in range(args.rounds):
        # Each round starts with another way, so that none is always the first.
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            times[way.name].append(decode(way, args.steps))
        for way in ways[1:] if i % 2 else []:
            clock = Clock()
            clock.put_all(way)
            decode(way, args.steps)
            clock.remove()
            parts[way.name].append({p: clock.seconds[p] / args.steps for p in PARTS})
    return times, parts


def measure(shape: str, dtype: str, args: argparse.Namespace) -> Rows:
    """Return a row per way of running one model."""
    model = make_llama(8192, getattr(torch, dtype), **SHAPES[shape])
    n_layers = SHAPES[shape]["layers"]
    ways = make_ways(model, torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(1)))
    times, parts = run_rounds(ways, args)
    rows = []
    for name, _, far, cache in ways:
        row: dict[str, Any] = dict(model=shape, dtype=dtype, way=name, layers=n_layers, context=CONTEXT,
                                   rounds=args.rounds, steps=args.steps, threads=args.threads)  # fmt: skip
        for i, clock in enumerate(("", "wall_")):
            mine, plain = ([t[i] for t in times[way]] for way in (name, "plain"))
            row |= {
                f"{clock}us_per_layer": 1e6 / n_layers * statistics.median(mine),
                f"{clock}least_us_per_layer": 1e6 / n_layers * min(mine),
                f"{clock}ratio": statistics.median(a / b for a, b in zip(mine, plain, strict=True)),
                f"{clock}least_ratio": min(mine) / min(plain),
            }
        if parts[name]:
            row["parts_us"] = {p: 1e6 / n_layers * statistics.median(part[p] for part in parts[name]) for p in PARTS}
        if far is not None and isinstance(cache, FarCache):
            row["kernel"] = far.receipt(cache).kernel
        rows.append(row)
    return rows


def format_table(path: Path = RESULTS / "overhead.jsonl") -> str:
    """Return one Markdown row per model and way."""
    lines = []
    for r in read_rows(path):
        cells = [f"{r['model']}, {r['dtype']}", r["way"], f"{r['us_per_layer']:.0f}"]
        cells += [f"{r[name]:.3f}" for name in ("ratio", "least_ratio", "wall_ratio", "wall_least_ratio")]
        lines.append(cells + [f"{r['parts_us'][p]:.1f}" if "parts_us" in r else "" for p in PARTS])
    head = ["model", "way", "µs per layer and step", "of plain", "least", "by the wall", "least", *PARTS]
    return format_rows(head, lines)


def main() -> None:
    parser = make_parser(__doc__, "overhead.jsonl")
    parser.add_argument("--models", default="small,1b", type=read_names, help="names, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", type=read_names, help="names, by commas")
    parser.add_argument("--rounds", default=30, type=int, help="times that every way is run")
    parser.add_argument("--steps", default=4, type=int, help="decode steps each time, the fastest counts")
    run = Recorder(parser)
    for shape in run.args.models:
        for dtype in run.args.dtypes:
            run.write(*measure(shape, dtype, run.args))
            run.say(f"{shape}, {dtype}")
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
