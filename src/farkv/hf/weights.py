"""Weights of linear maps in 8 or 4 bits, on a CPU: a decode step reads all of them once, so their bytes are its time.

In: a loaded model. Out: the same model, its linear maps replaced. Products are torch's own kernels for packed weights;
activations are not rounded but to bfloat16. Embeddings and norms stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from farkv._axes import Float, Tensor
from farkv.config import WEIGHTS, check_name, format_bytes
from farkv.errors import ConfigError
from farkv.hf import _compat
from farkv.hf.identity import identify_model, keep_identity
from farkv.hf.load_gguf import count_bytes, note_source

log = logging.getLogger("farkv")

# From so many rows on a product is bound by arithmetic, where torch's packed kernels are slower than a plain product of
# unpacked weights, a block of them at a time (docs/log.md).
MANY_ROWS = 17
BLOCK_OUTPUTS = 4096
# Weights that share a scale and a zero, in 4 bits; what torch's kernel asks of the outputs.
GROUP, MULTIPLE = 32, 16


class PackedLinear(nn.Module):
    """A linear map whose weights are packed; what reads it by `weight` fails, and does not find something else."""

    packed: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = source.in_features, source.out_features, source.bias

    def extra_repr(self) -> str:
        """Return the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def finish(self, product: Tensor, like: Tensor) -> Tensor:
        """Return a product of rows with its bias, in the shape of its input."""
        product = product if self.bias is None else product.add_(self.bias)
        return product.view(*like.shape[:-1], self.out_features)


class Int8Linear(PackedLinear):
    """y = (x @ W.T) * scale + bias, W of int8, a bfloat16 scale per output: |W * scale - weight| <= scale / 2.

    Cost: a byte per weight for up to 16 rows; for more, weights are unpacked block by block and multiplied plainly.
    """

    def __init__(self, source: nn.Linear):
        super().__init__(source)
        weight = source.weight.detach().float()
        # Rounded before the codes are made, so that it costs nothing; up, so that no code is above 127.
        scale = (weight.abs().amax(1) / 127 * (1 + torch.finfo(torch.bfloat16).eps)).clamp_min(1e-30).bfloat16()
        self.register_buffer("packed", (weight / scale[:, None].float()).round_().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows O"]:
        """Return the product, in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < MANY_ROWS:
            multiply = torch.ops.aten._weight_int8pack_mm
            return self.finish(multiply(rows.bfloat16(), self.packed, self.scale).to(x.dtype), x)
        product = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, BLOCK_OUTPUTS):
            part = slice(start, start + BLOCK_OUTPUTS)
            # Integers of 8 bits are exact in every dtype that a model has.
            product[:, part] = linear(rows, self.packed[part].to(x.dtype)) * self.scale[part].to(x.dtype)
        return self.finish(product, x)


class Int4Linear(PackedLinear):
    """y = x @ (W * scale + zero).T + bias, W of 4 bits; scale and zero of 32 weights each, in bfloat16.

    Cost: 5/8 of a byte per weight, at any number of rows.
    """

    def __init__(self, source: nn.Linear):
        super().__init__(source)
        groups = source.weight.detach().float().view(self.out_features, -1, GROUP)
        least = groups.amin(-1)
        scale = ((groups.amax(-1) - least) / 15).clamp_min(1e-8)
        codes = ((groups - least[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.int32)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("packed", pack(codes.view(self.out_features, self.in_features), 2))
        # The kernel counts codes from -8.
        scales = torch.stack([scale, least + 8 * scale], -1).transpose(0, 1).contiguous()
        self.register_buffer("scale", scales.bfloat16())

    def forward(self, x: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows O"]:
        """Return the product, in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return self.finish(multiply(rows, self.packed, GROUP, self.scale).to(x.dtype), x)


FORMS: dict[str, type[PackedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def refuse_packing(kind: str, device: torch.device) -> ConfigError:
    """Return the error about packed weights on another device than a CPU."""
    return ConfigError(
        f"weights: {kind} is for a CPU, the model is to be on {device.type}; give --device cpu, or a checkpoint that "
        "is quantised for a GPU"
    )


def pack_weights(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Replace a model's linear maps by packed ones, one after the other; `none` changes nothing.

    Args:
        kind: `int8`: one scale per output. `int4`: a scale and a zero per 32 weights. `none`.

    Raises:
        ConfigError: no such kind; the model is not on a CPU; it is quantised already.

    Cost: one pass over the weights; besides the packed ones a few copies of one map at a time, in float32.
    """
    check_name("weights", kind, WEIGHTS)
    if kind == "none":
        return model
    if model.device.type != "cpu":
        raise refuse_packing(kind, model.device)
    if (method := _compat.name_quantization(model)) is not None:
        raise ConfigError(f"weights: expected plain weights, these are quantised by {method}; leave --weights out")
    if any(isinstance(child, PackedLinear) for child in model.modules()):
        raise ConfigError("weights: expected plain weights, these are packed already; load the model again")
    keep_identity(model, identify_model(model))
    before, form = count_bytes(model), FORMS[kind]
    parents = [part for part in model.modules() if type(part) is not nn.Linear]
    uses = Counter(id(child) for part in parents for child in part.children() if type(child) is nn.Linear)
    # What is shared stays shared. Its plain form is held to the end; every other one's goes before the next is packed.
    shared = dict[int, tuple[nn.Linear, PackedLinear]]()
    n_packed = 0
    for parent, name in [(part, name) for part in parents for name, _ in part.named_children()]:
        child = getattr(parent, name)
        if type(child) is not nn.Linear:
            continue
        if kind == "int4" and (child.in_features % GROUP or child.out_features % MULTIPLE):
            continue
        n_packed += id(child) not in shared
        made = shared[id(child)][1] if id(child) in shared else form(child)
        if uses[id(child)] > 1:
            shared[id(child)] = child, made
        setattr(parent, name, made)
    was = getattr(model, "farkv_source", None)
    note = f"{kind} of {n_packed} of {len(uses)} linear maps"
    note_source(model, note if was is None else f"{note}, packed from {was}")
    log.info("%s: %s in memory, before %s", note, format_bytes(count_bytes(model)), format_bytes(before))
    return model
