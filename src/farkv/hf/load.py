"""Load a model and its tokenizer by name: `demo`, a folder, or a hub id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from farkv.demo import MODEL_PATH
from farkv.errors import ConfigError, InputError
from farkv.names import check_path
from farkv.quote import quote

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name: `demo` is the model inside the package.
        dtype: auto is the checkpoint's, except that float16 becomes float32 on a CPU, where half arithmetic is slow.
        device: auto is a GPU where there is one.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
        ConfigError: dtype or device is unknown.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    path = str(MODEL_PATH) if name == "demo" else name
    shown = quote(name)
    try:
        check_path(path)
        missing = looks_local(path) and not (Path(path) / "config.json").is_file()
    except OSError as error:
        raise InputError(f"model {shown}: {error.strerror}; expected demo, a folder or a hub id") from error
    if missing:
        raise InputError(f"model {shown}: expected a folder with a config.json, found none; or give a hub id, or demo")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, "auto"))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {shown}: cannot be loaded ({reason}); expected demo, a folder or a hub id") from error
    if dtype == "auto" and place.type == "cpu" and model.dtype == torch.float16:
        model = model.float()
    # transformers wraps `to` in a way that loses its signature.
    return model.to(place).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def quiet_libraries() -> None:
    """Keep Hugging Face's own bars and warnings out of the way of ours."""
    transformers.utils.logging.set_verbosity_error()
    # Silence the hub's retry messages; the final error is reported in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


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
