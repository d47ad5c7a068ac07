"""`farkv bench --calibrate`: the context length from which selecting records is faster than reading all of them.

In: nothing. Out: the times of both at every context, the crossover, and the file it is saved in.
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
from farkv.calibrate.crossover import save_crossover
from farkv.calibrate.processor import read_cpu_model
from farkv.engine.build import Roles, make_engine
from farkv.engine.setup import Setup
from farkv.kernels.native import IndexView, Native, Rows
from farkv.math.logits import Logits
from farkv.math.tables import ENTRIES
from farkv.methods import InfiniGen

SHAPE = SHAPES["llama3.2-1b"]
CONTEXTS = tuple(2**i for i in range(7, 15))
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

    def _draw_codes(self, heads: tuple[int, int], width: int) -> torch.Tensor:
        return torch.randint(-128, 128, (*heads, self.dense.case.context + 1, width), dtype=torch.int8)

    def step(self, layer: int) -> None:
        """Write a token's record, select, and attend to the selected records."""
        dense, native = self.dense, self.dense.native
        n, dim = dense.case.context + 1, dense.case.shape.head_dim
        dense.write(layer)
        q, logits = dense.queries[layer], Logits(dense.case.shape.scaling)
        chosen = native.select(q, self.index[layer], logits, cap=self.cap, n=n - self.newest, sinks=self.sinks)
        rows = Rows(dense.rows[layer], dim, dim)
        native.attend(q, rows, logits, positions=chosen, n=n, tail=self.newest)

    def restore(self) -> None:
        """Do nothing: every step writes the same record."""


def measure_times(native: Native, shape: ModelShape, context: int, rounds: int) -> Times:
    """Time both, interleaved, over the same records."""
    case = Case(shape, context, layers=MOST_LAYERS)
    dense = DenseNativeRunner(case, KVSource(shape, 1, case.device), native)
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
    """The measured times, the crossover, and the file it was saved in; None where selecting was never faster."""

    times: list[Times]
    tokens: int | None
    kernel: str
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        rows = [
            {"method": name, "context": one.context, "batch": 1, "ms_per_layer": round(ms, 4)}
            for one in self.times
            for name, ms in (("dense-native", one.dense_ms), ("infinigen", one.select_ms))
        ]
        path = None if self.path is None else str(self.path)
        machine = {"cpu": read_cpu_model(), "threads": torch.get_num_threads(), "kernel": self.kernel}
        return {"crossover_tokens": self.tokens, "path": path, "rows": rows, "machine": machine}


def calibrate(
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    shape: ModelShape = SHAPE,
    contexts: tuple[int, ...] | None = None,
    rounds: int = ROUNDS,
) -> Calibration:
    """Measure both at every context and save the crossover.

    Raises:
        ConfigError: there is no native kernel, or the file cannot be written.
    """
    native, times = require_native("--calibrate"), []
    contexts = contexts or CONTEXTS
    for context in contexts:
        times.append(measure_times(native, shape, context, rounds))
        tell(len(times), len(contexts))
    tokens = find_crossover(times)
    if tokens is None:
        return Calibration(times, None, native.name, None)
    details = {"threads": torch.get_num_threads(), "times_ms": [one._asdict() for one in times]}
    return Calibration(times, tokens, native.name, save_crossover(native.name, tokens, details))


def draw_calibration(found: Calibration) -> RenderableType:
    """Return a table of both times, and the crossover as a sentence."""
    table = make_table("dense against selecting: ms per layer", ("dense-native", "select", "faster"), "context")
    for one in found.times:
        faster = "select" if one.select_ms < one.dense_ms else "dense"
        table.add_row(format_tokens(one.context), format_ms(one.dense_ms), format_ms(one.select_ms), faster)
    result = f"selecting was never faster, up to {format_tokens(found.times[-1].context)} tokens; nothing was saved"
    if found.tokens is not None:
        result = f"selecting is faster from {format_tokens(found.tokens)} tokens on; saved to {found.path}"
    machine = found.to_dict()["machine"] | {"read_gb_per_s": None}
    return Group(table, Text(result), draw_machine(machine))
