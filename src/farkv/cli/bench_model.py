"""What a benchmark measures: a shape with random weights, or a real model. In: options. Out: checked, and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from farkv.cli.terminal import show_waiting
from farkv.config import WEIGHTS, check_name
from farkv.errors import ConfigError
from farkv.quote import quote

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farkv.bench.shapes import ModelShape


class Whole(NamedTuple):
    """What is measured whole: a shape of random weights, or a real model."""

    shape: ModelShape
    layers: int
    dtype: str
    model: PreTrainedModel | None


def choose_shape(shape: str | None, model: str | None, default: str) -> ModelShape:
    """Return the shape that is named, or that of a real model's layers.

    Raises:
        ConfigError: both are given, or the shape is unknown.
    """
    from farkv.bench.shapes import find_shape

    if model is None:
        return find_shape(shape or default)
    if shape is not None:
        raise ConfigError("--model: a real model has a shape of its own; drop --shape")
    from farkv.bench.real import read_shape
    from farkv.hf.load import quiet_libraries

    quiet_libraries()
    return read_shape(model)


def choose_dtype(model: str | None, dtype: str | None) -> torch.dtype:
    """Return the dtype of a model's records: the one that is named, or as `load_model` would load it on this CPU.

    Raises:
        ConfigError: there is no such dtype.
    """
    from farkv.hf.load import DTYPES, find_dtype

    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    if dtype in DTYPES:
        return DTYPES[dtype]
    return DTYPES["bfloat16"] if model is None else find_dtype(model)


def choose_whole(shape: str | None, model: str | None, layers: int | None, dtype: str, weights: str = "none") -> Whole:
    """Return what is measured whole. Raises as `choose_shape`."""
    check_name("--weights", weights, WEIGHTS)
    from farkv.bench.prefill import DTYPES

    if dtype not in (*DTYPES, *(("auto",) if model else ())):
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)}, or with --model auto; got {dtype!r}")
    if model is None:
        found = choose_shape(shape, model, "llama3.2-1b")
        return Whole(found, layers or found.layers, dtype, None)
    if shape is not None or layers is not None:
        raise ConfigError("--model: a real model has a shape and layers of its own; drop --shape and --layers")
    from farkv.bench.real import load_real
    from farkv.hf.load import quiet_libraries

    quiet_libraries()
    with show_waiting(f"loading {quote(model)}"):
        loaded, found = load_real(model, dtype, weights)
    return Whole(found, found.layers, str(loaded.dtype).removeprefix("torch."), loaded)


def choose_peer(peers: list[str] | None, model: str | None, batch: int) -> Path | None:
    """Return the file that llama.cpp runs beside farkv, before anything is loaded; None where nothing is asked for.

    Raises:
        ConfigError: another peer, no GGUF file, more than one sequence, or a package is missing.
    """
    if not peers:
        return None
    from farkv.bench.llama_cpp import require_llama_cpp
    from farkv.bench.methods import PEERS
    from farkv.hf.load_gguf import is_gguf

    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"--peer: expected {' or '.join(PEERS)}, got {name!r}")
    if model is None or not is_gguf(model):
        raise ConfigError(f"--peer llama.cpp: expected --model FILE.gguf, which both run, got {model!r}; give one")
    if batch > 1:
        raise ConfigError(f"--peer llama.cpp: supports --batch 1 only, got {batch}; drop one of them")
    require_llama_cpp()
    return Path(model)
