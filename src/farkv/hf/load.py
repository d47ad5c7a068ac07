"""Load a model and its tokenizer by name: `demo`, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from farkv.calibrate.processor import FAST_FLAGS, multiplies_fast
from farkv.config import WEIGHTS, check_name, format_bytes
from farkv.demo import MODEL_PATH
from farkv.errors import ConfigError, InputError
from farkv.hf import _compat
from farkv.hf.load_bytes import telling_bytes
from farkv.hf.load_gguf import SUFFIX, count_bytes, is_gguf, load_gguf, load_gguf_config, note_source
from farkv.hf.weights import pack_weights, refuse_packing
from farkv.names import check_path
from farkv.quote import quote

log = logging.getLogger("farkv")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = "demo, a folder, a GGUF file or a hub id"
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "none",
    on_load: Callable[[int, int | None], None] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name: `demo` is the model inside the package; a folder, a GGUF file, or a hub id.
        dtype: auto is the checkpoint's, except that half precision becomes float32 on a CPU that multiplies it no
            faster, which a line on the log `farkv` says. Of a GGUF file it is float32.
        device: auto is a GPU where there is one.
        weights: int8 or int4 packs linear maps on a CPU; see `pack_weights`.
        on_load: is told how many bytes of the weights are loaded, of how many; None where they are no local files.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
        ConfigError: dtype, device or weights is unknown, or cannot be had here.
    """
    check_name("weights", weights, WEIGHTS)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    if weights != "none" and place.type != "cpu":
        raise refuse_packing(weights, place)
    path = find_model(name)
    with nullcontext() if on_load is None else telling_bytes(path, on_load):
        model, tokenizer = load_plain(name, path, dtype)
    if dtype == "auto" and place.type == "cpu":
        model = widen(model, name)
    # transformers wraps `to` in a way that loses its signature.
    return pack_weights(model.to(place).eval(), weights), tokenizer  # pyright: ignore[reportArgumentType]


def load_plain(name: str, path: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer as transformers loads them. Raises as `load_model`."""
    if is_gguf(path):
        return load_gguf(path, DTYPES.get(dtype, torch.float32))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, "auto")), tokenizer
    except LOAD_ERRORS as error:
        raise refuse_model(name, error) from error


def load_config(name: str) -> Any:
    """Return a model's configuration without its weights. Raises as `load_model`."""
    path = find_model(name)
    if is_gguf(path):
        return load_gguf_config(path)
    try:
        return AutoConfig.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise refuse_model(name, error) from error


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype that `load_model` gives a model on this CPU, without its weights. Raises as `load_model`."""
    if is_gguf(find_model(name)):
        return torch.float32
    config = load_config(name).get_text_config(decoder=True)
    held = getattr(config, "dtype", None) or torch.float32
    held = DTYPES.get(held, torch.float32) if isinstance(held, str) else held
    return held if held not in FAST_FLAGS or multiplies_fast(held) else torch.float32


def find_model(name: str) -> str:
    """Return what transformers is to load under a name, after what can be said of it without transformers."""
    path = str(MODEL_PATH) if name == "demo" else name
    try:
        check_path(path)
        missing = looks_local(path) and not is_gguf(path) and not (Path(path) / "config.json").is_file()
    except OSError as error:
        raise InputError(f"model {quote(name)}: {error.strerror}; expected {KINDS}") from error
    if missing:
        files = sorted(file.name for file in Path(path).glob(f"*{SUFFIX}"))
        remedy = f"it has {quote(files[0])}: give that file" if files else "or give a GGUF file, a hub id, or demo"
        raise InputError(f"model {quote(name)}: expected a folder with a config.json, found none; {remedy}")
    return path


def refuse_model(name: str, error: BaseException) -> InputError:
    """Return the error about a model that transformers cannot load."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"model {quote(name)}: cannot be loaded ({reason}); expected {KINDS}")


def widen(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a model of half precision in float32 where this CPU computes in half no faster, and say so."""
    held = model.dtype
    if held not in FAST_FLAGS or multiplies_fast(held) or _compat.name_quantization(model) is not None:
        return model
    if name == "demo":
        # It is stored in half to be a small file; it was trained in float32.
        return model.float()
    half = str(held).removeprefix("torch.")
    log.warning(
        "model %s: this CPU has no fast products of %s: run in float32, whose weights take %s instead of %s "
        "(--dtype %s keeps them)",
        quote(name), half, format_bytes(2 * count_bytes(model)), format_bytes(count_bytes(model)), half,
    )  # fmt: skip
    note_source(model, f"{half} of the checkpoint")
    return model.float()


def quiet_libraries() -> None:
    """Keep Hugging Face's own bars and warnings out of the way of ours."""
    transformers.utils.logging.set_verbosity_error()
    # Silence the hub's retry messages; the final error is reported in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    _compat.set_gguf_bar(lambda rows, **_: rows)


def looks_local(path: str) -> bool:
    """Say whether a model name can only be a path: a hub id is `name` or `owner/name`."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def choose_device(device: str) -> torch.device:
    """Return the device of that name, or the best one for auto."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}") from error
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device: {device!r} is not available; expected auto, cpu or, with a GPU, cuda")
    return place
