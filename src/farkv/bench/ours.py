"""Runners of farkv over directly filled layers: the engine, driven as `hf` drives it, and the dense native kernel.

In: a case, a source of records. Out: runners.
"""

from __future__ import annotations

from farkv._axes import Tensor
from farkv.account import Account
from farkv.bench.case import Case, Traffic
from farkv.bench.fill import CHUNK_TOKENS, KVSource
from farkv.bench.torch_attention import Attention
from farkv.engine.build import Roles, make_engine
from farkv.engine.setup import Kernels, Setting, Setup
from farkv.engine.step import Engine
from farkv.kernels.native import Native, Rows
from farkv.math.logits import Logits
from farkv.math.step import Query, Step
from farkv.methods import InfiniGen
from farkv.store.memory import allocate
from farkv.store.records import StoreLimits

# Decoded tokens after which a layer is cropped to its original length. Many enough to include indexing: keys enter the
# index when they leave the recent window, one window at a time.
MOST_GROWTH = 64
QUERIES = 64


def fill_layer(engine: Engine, case: Case, source: KVSource, layer: int) -> None:
    """Store and index a layer's context as prefill does, but without attention."""
    # The projection is fitted to the first queries, so later chunks may reuse them.
    q = source.draw_q(layer, 0, min(case.context, CHUNK_TOKENS))
    for start, n in source.chunks(case.context):
        k, v = source.draw_kv(layer, start, n)
        engine.append(layer, k, v)
        engine.selector.observe(engine.records[layer], Step(Query(q[:, :, :n], Logits(case.shape.scaling)), k, v, None))


class InfiniGenRunner:
    """The engine, driven as `hf` drives it: append, speculate if the method does, attend."""

    def __init__(self, name: str, case: Case, source: KVSource, *, kernels: Native | None, quant: str | None = None):
        self.name, self.case, self.n_layers = name, case, case.fast_layers
        config = InfiniGen(fraction=case.fraction)
        # A whole window per round, so that each round includes the work done once per window.
        self.least_tokens = config.cap.window or 1
        self.account, self.grown = Account(), 0
        limits = StoreLimits(reserve_tokens=case.context + MOST_GROWTH + 2 * self.least_tokens, quant=quant)
        layers = list(range(self.n_layers))
        setup = Setup(layers, case.device, self.account, Setting(limits, kernels=Kernels(kernels)))
        self.engine = make_engine(Roles(config), setup)
        self.engine.announce_prompt(case.context, CHUNK_TOKENS)
        self.attention = Attention(case.shape)
        for layer in layers:
            fill_layer(self.engine, case, source, layer)
        self.steps = [[self._make_step(source, layer, i) for i in range(QUERIES)] for layer in layers]
        self.account.decoding = True

    def _make_step(self, source: KVSource, layer: int, i: int) -> Step:
        k, v = source.draw_kv(layer, self.case.context + i, 1)
        query = Query(source.draw_q(layer, self.case.context + i, 1), Logits(self.case.shape.scaling))
        return Step(query, k, v, None)

    def step(self, layer: int) -> None:
        """Append a token's record and attend to the selected records."""
        self.attend(layer)

    def attend(self, layer: int) -> Tensor:
        """Return one step's output, [B, Hq, 1, D]."""
        step = self.steps[layer][self.grown % QUERIES]
        if self.engine.wants_estimate(layer):
            # There is no previous layer to estimate from: the true query is used.
            self.engine.speculate(layer, step.query)
        self.engine.append(layer, step.k, step.v)
        out = self.engine.attend(layer, step, self.attention)
        self.grown += layer == self.n_layers - 1
        assert isinstance(out, Tensor)
        return out

    def restore(self) -> None:
        """Remove the tokens of earlier rounds once there are MOST_GROWTH of them."""
        if self.grown >= MOST_GROWTH:
            for layer in range(self.n_layers):
                self.engine.crop(layer, self.grown)
            self.grown = 0

    @property
    def traffic(self) -> Traffic:
        """Return the mean traffic of all steps so far, as counted for the receipt."""
        read, kv_bytes = self.account.read_fraction(), self.case.layer_bytes
        store = self.engine.store
        row_bytes = store.stored_bytes(store.shape(0))
        coded = row_bytes / self.case.shape.record_bytes()
        return Traffic(read, self.account.index_fraction() * kv_bytes, read * coded * kv_bytes, row_bytes)

    @property
    def index_fraction(self) -> float:
        """Return the index bytes scored per step over the KV bytes."""
        return self.account.index_fraction()

    @property
    def kernel_name(self) -> str:
        """Return the names of the kernels that ran."""
        return "+".join(sorted(self.account.kernels)) or "torch"


class DenseNativeRunner:
    """The dense counterpart of selective attention: the native kernel reads every record."""

    name = "dense-native"
    least_tokens = 1

    def __init__(self, case: Case, source: KVSource, native: Native):
        shape = case.shape
        self.case, self.native, self.n_layers = case, native, case.slow_layers
        size = (case.batch, shape.kv_heads, case.context + 1, 2 * shape.head_dim)
        self.rows = [allocate(size, source.dtype, case.device) for _ in range(self.n_layers)]
        for start, n in source.chunks(case.context):
            for layer, rows in enumerate(self.rows):
                k, v = source.draw_kv(layer, start, n)
                rows[:, :, start : start + n, : shape.head_dim] = k
                rows[:, :, start : start + n, shape.head_dim :] = v
        self.new = [source.draw_kv(layer, case.context, 1) for layer in range(self.n_layers)]
        self.queries = [source.draw_q(layer, case.context, 1) for layer in range(self.n_layers)]

    def step(self, layer: int) -> None:
        """Write a token's record and attend to all records."""
        self.attend(layer)

    def write(self, layer: int) -> None:
        """Write a token's record after the others."""
        rows, dim, n = self.rows[layer], self.case.shape.head_dim, self.case.context
        rows[:, :, n:, :dim], rows[:, :, n:, dim:] = self.new[layer]

    def attend(self, layer: int) -> Tensor:
        """Return one step's output, [B, Hq, 1, D]."""
        self.write(layer)
        rows, dim, n = self.rows[layer], self.case.shape.head_dim, self.case.context
        logits = Logits(self.case.shape.scaling)
        return self.native.attend(self.queries[layer], Rows(rows, dim, dim), logits, positions=None, n=n + 1)

    def restore(self) -> None:
        """Do nothing: every step writes the same record."""

    @property
    def traffic(self) -> Traffic:
        """Return the traffic of reading all records."""
        return Traffic(1.0, self.case.layer_bytes)
