"""What does farkv cost per layer and step where there is nothing to win? Decode steps over a short context.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --models small --rounds 40

In: random models (`small`: 16 layers, hidden size 256; `1b`: 4 layers of the shape of Llama-3.2-1B), a context of 256
tokens. Out: a JSON line per model, dtype and way of running: microseconds per layer and decode step, and how they
divide. All ways run in turns in one process, a few steps each, on models that share their weights:

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
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality import read_rows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from farkv.hf.attach import attach
from farkv.hf.attention import OwnAttention
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.layer import FarLayer
from farkv.hf.lookahead import Lookahead
from farkv.hf.query import Queries
from farkv.hf.verify import Verifier
from farkv.methods import Full, InfiniGen

CONTEXT = 256
VOCAB = 512
SHAPES: dict[str, dict[str, int]] = {
    "small": dict(hidden_size=256, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2,
                  intermediate_size=1024),
    "1b": dict(hidden_size=2048, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
               intermediate_size=8192),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = ("hooks", "pass", "estimate", "append", "recipe", "store", "attention", "speculate")


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
        self._undo: list[tuple[Any, str, Any]] = []

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
        self._undo.append((owner, name, had))
        setattr(owner, name, self.wrap(part, getattr(owner, name)))

    def remove(self) -> None:
        """Put everything back."""
        for owner, name, had in reversed(self._undo):
            setattr(owner, name, had) if had is not None else delattr(owner, name)
        self._undo = []


def make_model(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a random model."""
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=8192, **SHAPES[shape])
    return LlamaForCausalLM(config).to(dtype).eval()


def share(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a model of its own with the same weights in the same memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@torch.no_grad()
def make_ways(model: LlamaForCausalLM, prompt: torch.Tensor) -> list[Way]:
    """Return every way, its context read."""
    methods = {"ordinary": (InfiniGen(), None), "full": (Full(), None), "in place": (InfiniGen(), None),
               "far": (InfiniGen(), "1GiB")}  # fmt: skip
    ways = [Way("plain", model, None, DynamicCache(config=model.config))]
    for name, (method, near) in methods.items():
        twin = share(model)
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


def set_clock(clock: Clock, way: Way) -> None:
    """Time the parts of one way."""
    clock.put(Queries, "estimate", "estimate")
    clock.put(FarLayer, "update", "append")
    clock.put(FarLayer, "attend", "recipe")
    clock.put(OwnAttention, "__call__", "attention")
    for owner, name in ((FarCache, "begin"), (FarCache, "end"), (Verifier, "before"), (Verifier, "after")):
        clock.put(owner, name, "pass")
    clock.put(Lookahead, "_find_asker", "hooks")
    for module in way.model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                # Put back with the rest: a wrapped hook wraps the same hook again in the next round otherwise.
                clock._undo.append((Item(hooks, key), "hook", hook))
                hooks[key] = clock.wrap("hooks", hook)
    if not isinstance(way.cache, FarCache):
        return
    recipe: Any = way.cache.recipe
    clock.put(recipe, "speculate", "speculate")
    for name in ("append", "fetch", "read", "read_all", "keys", "locate"):
        clock.put(recipe.store, name, "store")


class Item:
    """One place of a dict as an attribute named `hook`."""

    def __init__(self, place: Any, key: Any):
        object.__setattr__(self, "_place", (place, key))

    def __setattr__(self, name: str, value: Any) -> None:
        place, key = self._place
        place[key] = value


def measure(shape: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per way of running one model."""
    model = make_model(shape, DTYPES[dtype])
    n_layers = model.config.num_hidden_layers
    prompt = torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    ways = make_ways(model, prompt)
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    parts: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for i in range(args.rounds):
        # Each round starts with another way, so that none is always the first.
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            times[way.name].append(decode(way, args.steps))
        for way in ways[1:] if i % 2 else []:
            clock = Clock()
            set_clock(clock, way)
            decode(way, args.steps)
            clock.remove()
            parts[way.name].append({p: clock.seconds[p] / args.steps for p in PARTS})
    rows = []
    for way in ways:
        rows.append(dict(model=shape, dtype=dtype, way=way.name, layers=n_layers, context=CONTEXT, rounds=args.rounds,
                         steps=args.steps, threads=args.threads))  # fmt: skip
        for i, clock in enumerate(("", "wall_")):
            mine, plain = ([t[i] for t in times[name]] for name in (way.name, "plain"))
            rows[-1] |= {
                f"{clock}us_per_layer": 1e6 / n_layers * statistics.median(mine),
                f"{clock}least_us_per_layer": 1e6 / n_layers * min(mine),
                f"{clock}ratio": statistics.median(a / b for a, b in zip(mine, plain, strict=True)),
                f"{clock}least_ratio": min(mine) / min(plain),
            }
        if parts[way.name]:
            timed = parts[way.name]
            rows[-1]["parts_us"] = {p: 1e6 / n_layers * statistics.median(row[p] for row in timed) for p in PARTS}
        if way.far is not None:
            if isinstance(way.cache, FarCache):
                rows[-1]["kernel"] = way.far.receipt(way.cache).kernel
            way.far.detach()
    return rows


def format_table(path: Path) -> str:
    """Return one Markdown row per model and way."""
    head = ["model", "way", "µs per layer and step", "of plain", "least", "by the wall", "least", *PARTS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in read_rows(path):
        cells = [f"{r['model']}, {r['dtype']}", r["way"], f"{r['us_per_layer']:.0f}"]
        cells += [f"{r[name]:.3f}" for name in ("ratio", "least_ratio", "wall_ratio", "wall_least_ratio")]
        cells += [f"{r['parts_us'][p]:.1f}" if "parts_us" in r else "" for p in PARTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/overhead.jsonl")
    parser.add_argument("--add", action="store_true", help="add to the results file")
    parser.add_argument("--models", default="small,1b", help="names, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="names, by commas")
    parser.add_argument("--rounds", default=30, type=int, help="times that every way is run")
    parser.add_argument("--steps", default=4, type=int, help="decode steps each time, the fastest counts")
    parser.add_argument("--threads", default=1, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    if not args.add:
        out.write_text("")
    for shape in args.models.split(","):
        for dtype in args.dtypes.split(","):
            rows = measure(shape, dtype, args)
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            sys.stderr.write(f"{shape}, {dtype}: done\n")
    print(format_table(out))


if __name__ == "__main__":
    main()
