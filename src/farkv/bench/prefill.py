"""`farkv bench prefill`: seconds per 1 K prompt tokens, with and without farkv.

In: a shape, contexts. Out: a report. Both models alternate on the same chunks, so that noise affects both equally.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from farkv.bench.fill import require_memory
from farkv.bench.machine import describe_machine
from farkv.bench.models import VOCABULARY, count_weight_bytes, make_model, share_weights
from farkv.bench.report import OURS, Report, Row, make_row
from farkv.bench.shapes import ModelShape, format_tokens
from farkv.bench.stopped import Keep
from farkv.bench.timing import summarize
from farkv.hf.attach import attach
from farkv.kernels.native import load_native
from farkv.methods import InfiniGen

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class PrefillSettings:
    """The user's settings. `fraction` None: the method's default; `model` None: random weights."""

    shape: ModelShape
    contexts: tuple[int, ...] = (4096,)
    layers: int = 2
    batch: int = 1
    rounds: int = 3
    chunk_tokens: int = 2048
    dtype: str = "float32"
    fraction: float | None = None
    model: PreTrainedModel | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        names = ("layers", "batch", "rounds", "chunk_tokens", "dtype", "fraction")
        real = self.model is not None
        return {"shape": self.shape.name, "real": real, "contexts": list(self.contexts)} | {
            n: getattr(self, n) for n in names
        }


def measure_prefill(settings: PrefillSettings, tell: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Measure every context.

    Raises:
        CapacityError: the model and both caches do not fit in memory.
        Stopped: by Ctrl-C; it has the contexts that were finished.
    """
    shape, dtype = settings.shape, getattr(torch, settings.dtype)
    longest = max(settings.contexts)
    # Both caches, and the copy of a layer that the plain cache's torch.cat makes.
    kv_bytes = (2 * settings.layers + 2) * shape.layer_bytes(longest, settings.batch, dtype.itemsize)
    weights = 0 if settings.model is not None else count_weight_bytes(shape, settings.layers, dtype.itemsize)
    require_memory(weights + kv_bytes, f"a model of {settings.layers} layers and {format_tokens(longest)} tokens")
    plain = settings.model or make_model(shape, settings.layers, longest + 1, dtype)
    rows, done = list[Row](), 0
    total = sum(settings.rounds * -(-context // settings.chunk_tokens) for context in settings.contexts)

    def advance() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    tell(0, total)
    with attach(share_weights(plain), InfiniGen(fraction=settings.fraction), profile=False) as far, Keep(rows) as keep:
        for context in settings.contexts:
            passes = [read_prompts(settings, context, plain, far, i, advance) for i in range(settings.rounds)]
            rows += make_rows(settings, context, passes)
    native = load_native()
    found = describe_machine(None, "torch" if native is None else native.name)
    title = f"prefill, {shape.name}, {settings.layers} layers, {settings.dtype}: the whole prompt"
    ratios = {row.context: row.more["ratio"] for row in rows if row.method == OURS}
    notes = [f"{format_tokens(n)} tokens: {ratio:.3f} × the plain model's time" for n, ratio in ratios.items()]
    return keep.give(Report(title, rows, found, settings.to_dict(), notes))


@torch.no_grad()
def read_prompts(
    settings: PrefillSettings, context: int, plain: PreTrainedModel, far: Any, i: int, advance: Callable[[], None]
) -> tuple[float, float]:
    """Prefill one prompt with both models, alternating chunk by chunk; return the seconds of farkv and plain model."""
    # A real model's may be smaller.
    words = min(VOCABULARY, plain.config.get_text_config().vocab_size)
    ids = torch.randint(words, (settings.batch, context), generator=torch.Generator().manual_seed(i))
    ours: Any = far.new_cache(tokens=context, batch=settings.batch, chunk_tokens=settings.chunk_tokens)
    theirs, seconds = DynamicCache(config=plain.config), [0.0, 0.0]
    for n, chunk in enumerate(ids.split(settings.chunk_tokens, dim=1)):
        pair = ((0, far.model, ours), (1, plain, theirs))
        # The order alternates.
        for which, model, cache in pair if (i + n) % 2 else pair[::-1]:
            start = time.perf_counter()
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds[which] += time.perf_counter() - start
        advance()
    return seconds[0], seconds[1]


def make_rows(settings: PrefillSettings, context: int, passes: list[tuple[float, float]]) -> list[Row]:
    """Return a row for each model, with the median of the per-round time ratios."""
    names = (OURS, f"hf-sdpa-{DTYPES[settings.dtype]}")
    ratio = summarize([ours / theirs for ours, theirs in passes]).median_s
    rows = []
    for which, name in enumerate(names):
        spread = summarize([seconds[which] / settings.layers for seconds in passes])
        per_1k = spread.median_s * settings.layers / context * 1024
        more = {"s_per_1k_tokens": round(per_1k, 4), "ratio": round(ratio, 4) if which == 0 else 1.0}
        rows.append(make_row(name, context, settings.batch, spread, layers=settings.layers, **more))
    return rows
