"""`farkv bench e2e`: tokens per second of a whole model with and without farkv, over directly filled caches.

In: a shape, contexts. Out: a report, including how the time per token grows with the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from transformers import DynamicCache, PreTrainedModel

from farkv.bench.case import Case
from farkv.bench.fill import KVSource, require_memory
from farkv.bench.llama_cpp import LlamaSteps, find_fastest, load_file
from farkv.bench.machine import describe_machine
from farkv.bench.models import count_weight_bytes, make_model, share_weights
from farkv.bench.ours import MOST_GROWTH, fill_layer
from farkv.bench.prefill import DTYPES
from farkv.bench.report import OURS, Report, Row, compare, draw_notes, format_fraction, format_ms, make_row, make_table
from farkv.bench.shapes import ModelShape, format_tokens
from farkv.bench.stopped import Keep
from farkv.bench.timing import divide, measure_interleaved, summarize
from farkv.errors import ConfigError
from farkv.hf.attach import attach
from farkv.hf.handle import Handle
from farkv.hf.weights import pack_weights
from farkv.kernels.native import load_native
from farkv.methods import InfiniGen


def name_methods(dtype: str) -> tuple[str, ...]:
    """Return the methods that a model of this dtype can be measured with; the last one is not by default."""
    return (OURS, f"hf-sdpa-{DTYPES[dtype]}", f"hf-eager-{DTYPES[dtype]}")


METHODS = name_methods("bfloat16")
LLAMA = LlamaSteps.name


@dataclass(frozen=True)
class ModelSettings:
    """The user's settings.

    Args:
        methods: empty: farkv and sdpa.
        fraction: None: the method's default.
        model: a real one, of `dtype`; None: random weights.
        peer_file: the GGUF file of the real one, which llama.cpp runs too; None: it does not.
    """

    shape: ModelShape
    contexts: tuple[int, ...]
    layers: int
    methods: tuple[str, ...] = ()
    batch: int = 1
    fraction: float | None = 0.05
    rounds: int = 5
    dtype: str = "bfloat16"
    weights: str = "none"
    model: PreTrainedModel | None = None
    peer_file: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: expected {', '.join(DTYPES)}, got {self.dtype!r}")
        known = name_methods(self.dtype)
        if not self.methods:
            object.__setattr__(self, "methods", known[:2])
        for name in self.methods:
            if name not in known:
                raise ConfigError(f"--methods: e2e supports {', '.join(known)}, got {name!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of weights and records."""
        return getattr(torch, self.dtype)

    @property
    def source(self) -> KVSource:
        """Return what the caches are filled with."""
        return KVSource(self.shape, self.batch, torch.device("cpu"), dtype=self.torch_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        names = ("layers", "methods", "batch", "fraction", "rounds", "dtype", "weights")
        real = self.model is not None
        peers = [] if self.peer_file is None else [LLAMA]
        return {"shape": self.shape.name, "real": real, "contexts": list(self.contexts), "peers": peers} | {
            n: getattr(self, n) for n in names
        }


class ModelRunner:
    """A model that decodes after a filled cache; one step runs all its layers."""

    n_layers = 1

    def __init__(self, name: str, model: PreTrainedModel, cache: Any, batch: int):
        self.name, self.model, self.cache, self.grown = name, model, cache, 0
        self.least_tokens = InfiniGen().window or 1 if name == OURS else 1
        self.ids = torch.arange(batch)[:, None]

    @torch.no_grad()
    def step(self, layer: int) -> None:
        """Decode one token."""
        self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
        self.grown += 1

    def restore(self) -> None:
        """Remove the tokens of earlier rounds once there are MOST_GROWTH of them."""
        if self.grown >= MOST_GROWTH:
            self.cache.crop(-self.grown)
            self.grown = 0


def fill_plain(settings: ModelSettings, context: int, source: KVSource) -> DynamicCache:
    """Return Hugging Face's cache filled with a context."""
    cache = DynamicCache()
    for layer in range(settings.layers):
        cache.update(*source.draw_kv(layer, 0, context), layer)
    return cache


def fill_far(settings: ModelSettings, context: int, source: KVSource, far: Handle) -> Any:
    """Return farkv's cache with a context stored and indexed as in prefill, but without attention."""
    cache: Any = far.new_cache(tokens=context + MOST_GROWTH + 32, batch=settings.batch)
    for layer in range(settings.layers):
        # What the cache layer's `update` does first: record dtype and device.
        cache.layers[layer].lazy_initialization(*source.draw_kv(layer, 0, 1))
        fill_layer(cache.engine, Case(settings.shape, context, settings.batch), source, layer)
    return cache


def measure_model(settings: ModelSettings, tell: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Measure every context and method.

    Raises:
        CapacityError: the model and all caches do not fit in memory.
        Stopped: by Ctrl-C; it has the contexts that were finished.
    """
    shape, plain = settings.shape, build_model(settings)
    rows: list[Row] = []
    keep = Keep(rows)
    n_methods = len(settings.methods) + (settings.peer_file is not None)
    done, total = 0, len(settings.contexts) * n_methods * (settings.rounds + 1)

    def advance() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    with (
        attach(share_weights(plain), InfiniGen(fraction=settings.fraction), profile=False) as far,
        open_peer(settings) as peer,
    ):
        if far.unmanaged_kinds:
            raise ConfigError(
                f"--model: e2e fills the caches of full-attention layers, {shape.name} has others "
                f"({', '.join(sorted(far.unmanaged_kinds))}); use farkv bench prefill, or another model"
            )
        tell(0, total)
        with keep:
            for context in settings.contexts:
                rows += measure_context(settings, context, (plain, far, peer), advance)
    native = load_native()
    found = describe_machine(None, "torch" if native is None else native.name, row_bytes=shape.record_bytes())
    growth = find_growth(rows)
    notes = [
        f"{name}: each 1 K tokens of context add {slope['ms_per_1k_tokens']:.3g} ms per token"
        + (
            f", {slope['share']:.3f} of {name_methods(settings.dtype)[1]}'s growth"
            if slope.get("share") and name == OURS
            else ""
        )
        for name, slope in growth.items()
    ]
    cap = "its own" if settings.fraction is None else f"{settings.fraction:.1%}"
    packed = "" if settings.weights == "none" else f", weights {settings.weights}"
    title = f"e2e, {shape.name}, {settings.layers} layers, {settings.dtype}{packed}, cap {cap}: whole model per token"
    return keep.give(Report(title, rows, found, settings.to_dict(), notes, {"growth": growth}))


def build_model(settings: ModelSettings) -> PreTrainedModel:
    """Return the model to measure, once it is known that the caches fit beside it."""
    shape, longest, itemsize = settings.shape, max(settings.contexts), settings.torch_dtype.itemsize
    layer_bytes = shape.layer_bytes(longest, settings.batch, itemsize)
    # The peer's cache, and the state that fills it.
    n_caches = len(settings.methods) + (0 if settings.peer_file is None else 2)
    kv_bytes = int((n_caches + 1 / 16) * settings.layers + 3) * layer_bytes
    # A real one is in memory already.
    weights = 0 if settings.model is not None else count_weight_bytes(shape, settings.layers, itemsize)
    weights += 0 if settings.peer_file is None else settings.peer_file.stat().st_size
    require_memory(weights + kv_bytes, f"a model of {settings.layers} layers and {format_tokens(longest)} tokens")
    if settings.model is not None:
        return settings.model
    return pack_weights(make_model(shape, settings.layers, longest + 1024, settings.torch_dtype), settings.weights)


def measure_context(
    settings: ModelSettings, context: int, models: tuple[PreTrainedModel, Handle, Any], advance: Callable[[], None]
) -> list[Row]:
    """Measure every method at one context."""
    plain, far, peer = models
    source, runners = settings.source, list[Any]()
    for name in settings.methods:
        if name == OURS:
            runners.append(ModelRunner(name, far.model, fill_far(settings, context, source, far), settings.batch))
            continue
        model = share_weights(plain)
        model.set_attn_implementation(name.split("-")[1])
        runners.append(ModelRunner(name, model, fill_plain(settings, context, source), settings.batch))
    with start_peer(peer, context) as steps:
        runners += steps
        seconds = measure_interleaved(runners, settings.rounds, advance=advance)
    rows = []
    for runner in runners:
        spread, read = summarize(seconds[runner.name]), 1.0
        more: dict[str, Any] = {"layers": settings.layers}
        if runner.name == OURS:
            account = runner.cache.account
            read = account.read_fraction()
            more |= {"index_fraction": account.index_fraction(), "fallbacks": dict(account.fallbacks)}
        if runner.name == LLAMA:
            more |= {"kv": runner.setting.name}
        more |= {"ms_per_token": round(1e3 * spread.median_s, 3)}
        more |= {"tokens_per_s": round(settings.batch / spread.median_s, 3)}
        layer = divide(spread, settings.layers)
        rows.append(make_row(runner.name, context, settings.batch, layer, read_fraction=read, **more))
    return rows


@contextmanager
def open_peer(settings: ModelSettings) -> Iterator[Any]:
    """Load what llama.cpp runs; None without one."""
    if settings.peer_file is None:
        yield None
        return
    with load_file(settings.peer_file, settings.shape, settings.layers) as model:
        yield model


@contextmanager
def start_peer(model: Any, context: int) -> Iterator[list[Any]]:
    """Return llama.cpp's runner at a context, with its fastest setting; none without a model."""
    if model is None:
        yield []
        return
    threads = torch.get_num_threads()
    fastest = find_fastest(lambda setting: LlamaSteps(model, setting, context, threads))
    with closing(LlamaSteps(model, fastest, context, threads)) as steps:
        yield [steps]


def find_growth(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return, by method, the growth of ms per token from the smallest to the largest context, and over sdpa's."""
    growth: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row.method for row in rows):
        own = sorted((row for row in rows if row.method == name), key=lambda row: row.context)
        if own[-1].context > own[0].context:
            more_ms = own[-1].more["ms_per_token"] - own[0].more["ms_per_token"]
            growth[name] = {"ms_per_1k_tokens": 1024 * more_ms / (own[-1].context - own[0].context)}
    sdpa = next((name for name in growth if name.startswith("hf-sdpa")), "")
    base = growth.get(sdpa, {}).get("ms_per_1k_tokens", 0.0)
    if base > 0:
        for slope in growth.values():
            slope["share"] = slope["ms_per_1k_tokens"] / base
    return growth


def draw_model(report: Report) -> RenderableType:
    """Return a table of methods and contexts with the times of whole tokens."""
    table = make_table(report.title, ("context", "ms/token", "tokens/s", "ms/layer", "reads", f"× {OURS}"))
    for row in report.rows:
        table.add_row(
            row.method, format_tokens(row.context), format_ms(row.more["ms_per_token"]),
            f"{row.more['tokens_per_s']:.2f}", format_ms(row.ms_per_layer), format_fraction(row.read_fraction),
            compare(row, report.rows),
        )  # fmt: skip
    return Group(table, *draw_notes(report))
