"""`farkv bench --calibrate`: the context length from which selecting records is faster than reading all of them.

In: a shape and a dtype. Out: the times of both at every context, the crossover, and the file it is saved in. Both run
over the same records, interleaved round by round, and their medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from farkv.account import Account
from farkv.bench.case import Case
from farkv.bench.fill import KVSource
from farkv.bench.machine import require_native
from farkv.bench.ours import DenseNativeRunner
from farkv.bench.report import draw_machine, format_ms, make_table
from farkv.bench.shapes import SHAPES, ModelShape, format_tokens
from farkv.bench.timing import measure_interleaved, summarize
from farkv.calibrate.crossover import RecordShape, save_crossover
from farkv.calibrate.processor import read_cpu_model
from farkv.engine.build import Roles, make_engine
from farkv.engine.setup import Setup
from farkv.kernels.native import IndexView, Native, Rows
from farkv.kernels.ways import Drawn
from farkv.math.logits import Logits
from farkv.math.tables import ENTRIES
from farkv.methods import InfiniGen

SHAPE = SHAPES["llama3.2-1b"]
CONTEXTS = tuple(2**i for i in range(7, 16))
ROUNDS = 25
# More layers would not make short contexts colder in the processor's caches than a real model's weights do.
MOST_LAYERS = 16


class Times(NamedTuple):
    """Milliseconds per layer of dense reads and of selection, at one context."""

    context: int
    dense_ms: float
    select_ms: float


class SelectRunner:
    """Selects records and attends to them with the native kernels, over the rows of the dense runner."""

    name = "select"
    least_tokens = 1

    def __init__(self, dense: DenseNativeRunner):
        self.dense, self.n_layers = dense, dense.n_layers
        case = dense.case
        engine = make_engine(Roles(InfiniGen()), Setup([0], case.device, Account()))
        cap = engine.parts.budgets.split(case.context + 1, 0)
        self.sinks, self.newest, self.cap = cap.sinks, cap.newest, cap.early + cap.late
        coder = InfiniGen().make_coder(engine.selector.place)
        size = coder.measure(case.shape.head_dim, case.shape.record_bytes())
        heads = (case.batch, case.shape.kv_heads)
        projection = torch.randn(*heads, case.shape.head_dim, size.columns) / size.columns**0.5
        tables = torch.randn(*heads, ENTRIES * size.nibbles, size.width)
        self.index = [
            IndexView(self._draw_codes(heads, size.nibbles // 2), projection, tables) for _ in range(self.n_layers)
        ]
        # The default method draws the records of heads that gain by it, which takes longer than to choose the best.
        self.seeds = torch.arange(heads[0] * heads[1]).view(heads)

    def _draw_codes(self, heads: tuple[int, int], width: int) -> torch.Tensor:
        return torch.randint(-128, 128, (*heads, self.dense.case.context + 1, width), dtype=torch.int8)

    def step(self, layer: int) -> None:
        """Write a token's record, select, and attend to the selected records."""
        dense, native = self.dense, self.dense.native
        n, dim = dense.case.context + 1, dense.case.shape.head_dim
        dense.write(layer)
        q, logits = dense.queries[layer], Logits(dense.case.shape.scaling)
        n_open = n - self.newest
        cap = min(self.cap, n_open)
        drawn = Drawn(self.seeds, torch.empty(*self.seeds.shape, cap)) if cap < n_open else None
        chosen = native.select(q, self.index[layer], logits, cap=cap, n=n_open, sinks=self.sinks, drawn=drawn)
        rows = Rows(dense.rows[layer], dim, dim)
        odds = None if drawn is None else drawn.odds
        native.attend(q, rows, logits, positions=chosen, n=n, tail=self.newest, odds=odds)

    def restore(self) -> None:
        """Do nothing: every step writes the same record."""


def measure_times(native: Native, shape: ModelShape, dtype: torch.dtype, context: int, rounds: int) -> Times:
    """Time both, interleaved, over the same records."""
    case = Case(shape, context, layers=MOST_LAYERS)
    dense = DenseNativeRunner(case, KVSource(shape, 1, case.device, dtype=dtype), native)
    seconds = measure_interleaved([dense, SelectRunner(dense)], rounds)
    return Times(context, *(1e3 * summarize(seconds[name]).median_s for name in ("dense-native", "select")))


def find_crossover(times: list[Times]) -> int | None:
    """Return the smallest context from which selecting is faster at every measured length; None if there is none."""
    found = None
    for one in sorted(times, reverse=True):
        if one.select_ms >= one.dense_ms:
            break
        found = one.context
    return found


class Calibration(NamedTuple):
    """The measured times, the crossover (None where selecting was never faster), of what, and the file with it."""

    times: list[Times]
    tokens: int | None
    kernel: str
    shape: RecordShape
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        rows = [
            {"method": name, "context": one.context, "batch": 1, "ms_per_layer": round(ms, 4)}
            for one in self.times
            for name, ms in (("dense-native", one.dense_ms), ("infinigen", one.select_ms))
        ]
        machine = {"cpu": read_cpu_model(), "threads": torch.get_num_threads(), "kernel": self.kernel}
        found = {"crossover_tokens": self.tokens, "shape": self.shape._asdict(), "path": str(self.path)}
        return {**found, "rows": rows, "machine": machine}


def calibrate(
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    shape: ModelShape = SHAPE,
    dtype: torch.dtype = torch.bfloat16,
    contexts: tuple[int, ...] | None = None,
    rounds: int = ROUNDS,
) -> Calibration:
    """Measure both at every context and save the crossover of this shape.

    Where selecting was never faster, everything is read up to the longest context that was measured.

    Raises:
        ConfigError: there is no native kernel, or the file cannot be written.
    """
    native, times = require_native("--calibrate"), []
    contexts = contexts or CONTEXTS
    tell(0, len(contexts))
    for context in contexts:
        times.append(measure_times(native, shape, dtype, context, rounds))
        tell(len(times), len(contexts))
    tokens = find_crossover(times)
    groups = shape.heads // shape.kv_heads
    records = RecordShape(shape.kv_heads, shape.head_dim, groups, str(dtype).removeprefix("torch."))
    details = {"threads": torch.get_num_threads(), "times_ms": [one._asdict() for one in times]}
    path = save_crossover(native.name, records, contexts[-1] if tokens is None else tokens, details)
    return Calibration(times, tokens, native.name, records, path)


def draw_calibration(found: Calibration) -> RenderableType:
    """Return a table of both times, and the crossover as a sentence."""
    table = make_table("dense against selecting: ms per layer", ("dense-native", "select", "faster"), "context")
    for one in found.times:
        faster = "select" if one.select_ms < one.dense_ms else "dense"
        table.add_row(format_tokens(one.context), format_ms(one.dense_ms), format_ms(one.select_ms), faster)
    longest = format_tokens(found.times[-1].context)
    result = f"selecting was never faster: up to {longest} tokens, the longest measured, everything is read"
    if found.tokens is not None:
        result = f"selecting is faster from {format_tokens(found.tokens)} tokens on"
    result += f"; saved for models of {found.shape} to {found.path}"
    machine = found.to_dict()["machine"] | {"read_gb_per_s": None}
    return Group(table, Text(result), draw_machine(machine))
