"""Load a GGUF file as transformers reads it: its weights become plain tensors of one dtype.

In: a path. Out: a model, a tokenizer, and one line about what became of the weights.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from farkv.config import format_bytes
from farkv.errors import InputError
from farkv.hf import _compat
from farkv.hf.gguf_header import GgufHeader, read_header
from farkv.hf.packed import PackedLinear
from farkv.quote import quote

log = logging.getLogger("farkv")

SUFFIX = ".gguf"
# Rotations that differ by frequency, or by the context's length. transformers has its own from a config, and a GGUF
# file has none.
ROTATIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# Where a file says which tokens begin and end a text, and pad a batch.
TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}


def is_gguf(path: str) -> bool:
    """Return whether a model's name can only be meant as a GGUF file."""
    return Path(path).is_file() or (path.lower().endswith(SUFFIX) and not Path(path).is_dir())


def load_gguf(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Load a causal LM and its tokenizer from a GGUF file; nothing that stands beside it is read.

    Raises:
        InputError: it is not there, not whole, not GGUF, of an architecture that transformers does not read, or the
            packages of the extra `gguf` are missing.
    Cost: the vocabulary is parsed by transformers three times, some seconds each.
    """
    header = check_file(path)
    with standing_alone(path, header) as (folder, options):
        config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **options, **_compat.unpack_gguf()
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise refuse(path, f"it lacks {len(missing)} of the weights that transformers asks for, {missing[0]} first")
    settle(model, tokenizer, path, header)
    return model, tokenizer


def load_gguf_config(path: str) -> Any:
    """Return the configuration that a GGUF file has, without its weights. Raises as `load_gguf`."""
    with standing_alone(path, check_file(path)) as (folder, options):
        return AutoConfig.from_pretrained(folder, **options)


@contextmanager
def standing_alone(path: str, header: GgufHeader) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a folder with this file alone, and the arguments by which transformers finds it there.

    transformers takes a folder and a name in it, and prefers another model's tokenizer_config.json that lies there.
    """
    with tempfile.TemporaryDirectory(prefix="farkv-gguf-") as folder:
        alone = Path(folder, "model.gguf")
        alone.symlink_to(Path(path).absolute())
        try:
            yield folder, {"gguf_file": alone.name, "local_files_only": True}
        except MemoryError:
            raise
        # Whatever numpy, gguf and transformers raise over a file that others wrote.
        except Exception as error:
            raise refuse(path, f"transformers cannot load its architecture {header.architecture!r}", error) from error


def check_file(path: str) -> GgufHeader:
    """Return a file's header, or say why it cannot be loaded, before transformers is asked."""
    try:
        header = read_header(path)
        import_module("accelerate")
    except OSError as error:
        raise refuse(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise refuse(path, str(error)) from error
    except ImportError as error:
        raise InputError(
            f"model {quote(path)}: a GGUF file needs the packages gguf and accelerate ({error}); install them: "
            "pip install 'farkv[gguf]'"
        ) from error
    if (parts := header.fields.get("split.count", 1)) not in (0, 1):
        raise refuse(path, f"it is one of {parts} parts; join them first: llama-gguf-split --merge")
    return header


def refuse(path: str, why: str, error: BaseException | None = None) -> InputError:
    """Return the error about a file."""
    if error is not None:
        lines = str(error).strip().splitlines()
        why += f" ({type(error).__name__}{': ' + lines[0] if lines else ''})"
    return InputError(f"model {quote(path)}: {why}; expected a whole GGUF file of a decoder that transformers reads")


def settle(model: PreTrainedModel, tokenizer: Any, path: str, header: GgufHeader) -> None:
    """Give model and tokenizer the file's name, note where the weights are from, and say so."""
    _compat.forget_quantization(model)
    model.config._name_or_path = tokenizer.name_or_path = path
    name_tokens(tokenizer, header)
    shown, dtype = quote(Path(path).name), str(model.dtype).removeprefix("torch.")
    types, how = header.describe_types(), "dequantised" if header.is_quantised else "read"
    note_source(model, f"{types} of {shown}, {how} by transformers")
    log.warning(
        "%s: %s weights, %s by transformers into %s: %s in memory, %s in the file (--dtype sets another dtype)",
        shown, types, how, dtype, format_bytes(count_bytes(model)), format_bytes(header.n_bytes),
    )  # fmt: skip
    if lost := [name for name in ROTATIONS if name in header.tensors]:
        log.warning(
            "%s: transformers does not read %s, so positions are rotated without it, and long contexts are read worse "
            "than by llama.cpp; use the model's own folder or hub id for those", shown, lost[0],
        )  # fmt: skip


def name_tokens(tokenizer: Any, header: GgufHeader) -> None:
    """Let a tokenizer's special tokens be those of the file: transformers 5.16 takes the first for the last."""
    for name, key in TOKENS.items():
        number = header.fields.get(f"tokenizer.ggml.{key}_token_id")
        if not isinstance(number, int) or not 0 <= number < len(tokenizer):
            continue
        token = tokenizer.convert_ids_to_tokens(number)
        if token != getattr(tokenizer, name):
            setattr(tokenizer, name, token)


def note_source(model: Any, source: str) -> None:
    """Note what a model's weights were made from, for the receipts of its runs."""
    model.farkv_source = source


def count_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights, packed ones included."""
    plain = sum(x.numel() * x.element_size() for x in model.parameters())
    return plain + sum(child.count_bytes() for child in model.modules() if isinstance(child, PackedLinear))
