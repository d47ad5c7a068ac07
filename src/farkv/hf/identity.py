"""A model's identity: enough to check that a file was made for it, independent of the dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.hf import _compat
from farkv.hf.latents import MARKS
from farkv.hf.packed import PackedLinear

# Values of each parameter.
SAMPLED = 512


def keep_identity(model: Any, identity: dict[str, str]) -> None:
    """Let a model whose weights are packed be known as what it was packed from."""
    model.farkv_identity = identity


def identify_model(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's family, shape and a digest of a few weights.

    The weights are rounded to bfloat16 first, so that one checkpoint loaded in two dtypes is one model.
    """
    if (kept := getattr(model, "farkv_identity", None)) is not None:
        return dict(kept)
    config = _compat.text_config(model)
    digest = hashlib.sha256()
    first, *_, last = model.parameters()
    embedding: Any = getattr(model.get_input_embeddings(), "weight", first)
    for weight in (embedding[:64], last.reshape(-1)[:4096]):
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model_type": str(config.model_type),
        "layers": str(config.num_hidden_layers),
        "hidden": str(config.hidden_size),
        "weights": digest.hexdigest()[:32],
    }


def digest_weights(model: PreTrainedModel) -> str:
    """Return a digest of some of every weight: what was trained on from another model is not that model.

    A model whose weights are packed is not the model that they were packed from: its keys are others.

    Cost: SAMPLED values of every parameter copied to the host.
    """
    packed = (part for child in model.modules() if isinstance(child, PackedLinear) for part in child.list_packed())
    return digest_tensors(chain(model.parameters(), packed))


def digest_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a digest of some values of every tensor: numbers rounded to bfloat16, codes as they are.

    Of what wraps others, of those.
    """
    digest = hashlib.sha256()
    for tensor in chain.from_iterable(map(list_parts, tensors)):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        rounded = torch.bfloat16 if sample.is_floating_point() else sample.dtype
        digest.update(sample.to("cpu", rounded).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def list_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of: a quantised weight is codes and scales."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    return [part for name in names for part in list_parts(getattr(tensor, name))]


class ModelIdentity:
    """Who an attached model is, all that its keys and values follow from; changed weights are looked at again."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._seen: object = None
        self._digests: dict[str, str] = {}

    def get(self) -> dict[str, str]:
        """Return the identity as of now: weights, buffers, configuration and the switches of modules."""
        model = self.model
        # A model's frequencies may grow with the text; these do not.
        buffers = [t for name, t in model.named_buffers() if not name.endswith(".inv_freq") or not grows(model, name)]
        seen = note_versions([*model.parameters(), *buffers])
        if seen is None or seen != self._seen:
            self._digests = {"every_weight": digest_weights(model), "buffers": digest_tensors(buffers)}
            self._seen = seen
        settings = _compat.text_config(model).to_dict().items()
        kept = sorted((name, plain(value)) for name, value in settings if name not in VARIES)
        return {
            **identify_model(model),
            **self._digests,
            "settings": digest_text(repr(kept)),
            "switches": digest_text(repr(list(list_switches(model)))),
        }


# Of a configuration what says how a model is run or saved, not what it computes.
VARIES = frozenset(
    """
    _name_or_path architectures dtype torch_dtype transformers_version use_cache output_attentions output_hidden_states
    return_dict bos_token_id eos_token_id pad_token_id id2label label2id problem_type quantization_config
    """.split()
)
# Of a module what no answer depends on.
OWN = frozenset(vars(nn.Module())) | MARKS | {"gradient_checkpointing", "max_seq_len_cached", "name_or_path"}


def grows(model: nn.Module, name: str) -> bool:
    """Say whether a rotary table is one that is made anew for longer texts; its original is a buffer, too."""
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "original_inv_freq")


def note_versions(tensors: list[Tensor]) -> object:
    """Return what changes when a tensor is written to or replaced; None where torch does not know."""
    try:
        return [(id(t), t._version) for t in tensors]
    except RuntimeError:
        # Made in torch.inference_mode.
        return None


def list_switches(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield the plain attributes of every part of a model: which adapter is active, and by how much, among them."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            for key, value in sorted(vars(module).items()):
                if key not in OWN and (text := plain(value)) is not None:
                    yield name, key, text


def plain(value: object) -> str | None:
    """Return numbers, texts and what holds them as text; None for anything else."""
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value)
    if isinstance(value, dict):
        return repr(sorted((str(key), plain(item)) for key, item in value.items()))
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item) for item in value]
        return repr(sorted(map(str, items)) if isinstance(value, set | frozenset) else items)
    return None


def digest_text(text: str) -> str:
    """Return a digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def identify_tokenizer(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer's words and template, None without one."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word}\0{number}\n".encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()[:32]
