"""The methods of a decode measurement by name, their memory needs and their runners.

In: options. Out: checked settings, and for each context the runners of all methods over filled caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from farkv.bench.case import Case
from farkv.bench.fill import BLOCK_ROWS, KVSource
from farkv.bench.machine import BUFFER_BYTES, require_native
from farkv.bench.ours import DenseNativeRunner, InfiniGenRunner
from farkv.bench.peers import DTYPES, HuggingFaceRunner, KeyValues, MatmulRunner
from farkv.bench.shapes import ModelShape
from farkv.errors import ConfigError
from farkv.kernels.native import Native
from farkv.store.far.quantize import encoded_bytes

DEFAULT = ("infinigen", "dense-native", "matmul-bf16", "matmul-fp32", "hf-sdpa-bf16", "hf-sdpa-fp32")
CODED = {"infinigen-int8": "int8", "infinigen-int4": "int4"}
METHODS = (*DEFAULT, "hf-eager-bf16", "hf-eager-fp32", *CODED)
PEERS = ("llama.cpp",)


@dataclass(frozen=True)
class Settings:
    """The user's settings."""

    shape: ModelShape
    contexts: tuple[int, ...]
    methods: tuple[str, ...] = DEFAULT
    peers: tuple[str, ...] = ()
    batch: int = 1
    fraction: float = 0.05
    layers: int | None = None
    rounds: int = 12
    buffer_bytes: int = BUFFER_BYTES
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"--methods: expected some of {', '.join(METHODS)}, got {name!r}")
        for name in self.peers:
            if name not in PEERS:
                raise ConfigError(f"--peer: expected {' or '.join(PEERS)}, got {name!r}")

    def case(self, context: int) -> Case:
        """Return the parameters of one context."""
        return Case(self.shape, context, self.batch, self.fraction, self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        names = ("methods", "peers", "batch", "fraction", "layers", "rounds")
        return {"shape": self.shape.name, "contexts": list(self.contexts)} | {n: getattr(self, n) for n in names}


def check_native(settings: Settings, native: Native | None) -> tuple[Settings, list[str]]:
    """Without a native kernel, drop dense-native from the default methods and add a note.

    Raises:
        ConfigError: dense-native was named explicitly.
    """
    if native is not None or "dense-native" not in settings.methods:
        return settings, []
    if settings.methods != DEFAULT:
        require_native("dense-native")
    methods = tuple(name for name in settings.methods if name != "dense-native")
    return replace(settings, methods=methods), ["no native kernel: dense-native is skipped and no floor is measured"]


def count_bytes(settings: Settings, context: int) -> int:
    """Return the peak bytes of all methods at one context together."""
    case, shape = settings.case(context), settings.shape
    layer, total, widest = case.layer_bytes, settings.buffer_bytes, 0
    for name in settings.methods:
        if name == "infinigen":
            total += case.fast_layers * layer * 17 // 16
        elif name in CODED:
            coded = encoded_bytes(CODED[name], shape.head_dim, shape.head_dim) / shape.record_bytes()
            total += int(case.fast_layers * layer * (coded + 1 / 16))
        elif name == "dense-native":
            total += case.slow_layers * layer
    for suffix, dtype in DTYPES.items():
        names = [name for name in settings.methods if name.endswith(suffix)]
        total += case.slow_layers * layer * dtype.itemsize // 2 if names else 0
        # The copies that torch.cat makes; eager attention also repeats the KV heads.
        groups = shape.heads // shape.kv_heads if any("eager" in name for name in names) else 0
        widest = max(widest, (1 + groups) * layer * dtype.itemsize // 2 if names else 0)
    return total + widest


def make_runners(settings: Settings, context: int, native: Native | None) -> list[Any]:
    """Return every method's runner over filled caches; baselines of one dtype share a cache."""
    case = settings.case(context)
    source = KVSource(settings.shape, settings.batch, case.device, rows=settings.block_rows)
    held = {
        suffix: KeyValues(case, source, dtype)
        for suffix, dtype in DTYPES.items()
        if any(name.endswith(suffix) for name in settings.methods)
    }
    runners: list[Any] = []
    for name in settings.methods:
        if name == "infinigen" or name in CODED:
            runners.append(InfiniGenRunner(name, case, source, kernels=native, quant=CODED.get(name)))
        elif name == "dense-native":
            assert native is not None
            runners.append(DenseNativeRunner(case, source, native))
        elif name.startswith("matmul"):
            runners.append(MatmulRunner(name, held[name[-4:]]))
        else:
            runners.append(HuggingFaceRunner(name, held[name[-4:]], eager="eager" in name))
    return runners
