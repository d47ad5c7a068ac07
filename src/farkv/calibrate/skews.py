"""What the skews of a profile must be: of whole layers, of one form, finite, and a change of basis.

In: named tensors. Out: each layer's KV heads and head dimension, or a ValueError in words.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from farkv._axes import Tensor

# More columns than this never help; storing all D of both bases would make up most of the file.
MAX_COLUMNS = 64
PARTS = ("query", "key", "mean", "svd")
_NAME = re.compile(r"layer\.(0|[1-9][0-9]{0,4})\.(query|key|mean|svd)")
# A base in float32 is off by less than one step per product; more is damage.
_STEPS = 4 * torch.finfo(torch.float32).eps


class HeadForm(NamedTuple):
    """What a layer's skews are made for."""

    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads} KV heads of {self.dim}"


def check_skews(tensors: dict[str, Tensor]) -> dict[int, HeadForm]:
    """Return the form of every layer, ascending.

    Raises:
        ValueError: a name is not known, a layer is not whole, a tensor's form is wrong, or a number is impossible.

    Cost: two products of D x D per KV head.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"expected tensors layer.N.{'|'.join(PARTS)}, got {str(name)[:60]!r}")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    return {layer: _check_layer(layer, layers[layer]) for layer in sorted(layers)}


def _check_layer(layer: int, parts: dict[str, Tensor]) -> HeadForm:
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise ValueError(f"layer {layer}: lacks {', '.join(missing)}")
    svd = parts["svd"]
    if svd.dim() != 4 or svd.shape[0] != 1 or svd.shape[2] != svd.shape[3] or 0 in svd.shape:
        raise ValueError(f"layer {layer}: expected svd of [1, KV heads, D, D], got {list(svd.shape)}")
    form = HeadForm(svd.shape[1], svd.shape[2])
    base = (1, form.heads, form.dim, min(form.dim, MAX_COLUMNS))
    shapes = {"query": base, "key": base, "mean": (1, form.heads, 1, form.dim), "svd": tuple(svd.shape)}
    for part, shape in shapes.items():
        tensor = parts[part]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ValueError(f"layer {layer}: expected {part} of float32 {list(shape)}, got {got}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"layer {layer}: expected finite numbers in {part}")
    if not bool(torch.isfinite(parts["mean"].square()).all()):
        raise ValueError(f"layer {layer}: expected a mean of keys whose squares were summed, got one that overflows")
    # svd is orthogonal; of the bilinear pair A_k^T A_q = 1 for any number of leading columns.
    for name, left, right in (("svd", svd, svd), ("query and key", parts["key"], parts["query"])):
        off = _measure_off(left.double(), right.double())
        if off > 1:
            raise ValueError(f"layer {layer}: {name} are no change of basis: off by {off:.3g} times what rounding is")
    return form


def _measure_off(left: Tensor, right: Tensor) -> float:
    """Return by how much left^T right differs from 1, relative to what rounding to float32 can do."""
    one = torch.eye(left.shape[-1], dtype=left.dtype)
    allowed = _STEPS * (left.abs().mT @ right.abs()) + 1e-6
    return float(((left.mT @ right - one).abs() / allowed).amax())
