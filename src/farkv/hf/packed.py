"""Linear maps whose weights are packed in 8 or 4 bits, on a CPU: products are torch's own kernels for packed weights.

In: a linear map. Out: one of fewer bytes that stands for nearly the same weights, and says how many they are.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from farkv._axes import Float, Float32, Tensor
from farkv.errors import ConfigError
from farkv.kernels.native import load_native
from farkv.math import halves

# From so many rows on, a product of unpacked weights, a block of them at a time, is faster than torch's kernel for
# bfloat16 rows (docs/log.md).
MANY_ROWS = 17
BLOCK_OUTPUTS = 4096
# Weights that share a scale and a zero, in 4 bits; what torch's kernel asks of the outputs.
GROUP, MULTIPLE = 32, 16
# Rows that are multiplied at a time: what they are split into is as large as they are, twice.
BLOCK_ROWS = 512
# Codes of FBGEMM's maps that are kept where they can be seen.
SAMPLED = 512


class PackedLinear(nn.Module):
    """A linear map whose weights are packed; what reads it by `weight` fails, and does not find something else."""

    codes: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = source.in_features, source.out_features, source.bias

    def extra_repr(self) -> str:
        """Return the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def list_packed(self) -> list[Tensor]:
        """Return the packed weights as far as they can be seen: a digest samples them."""
        return [self.codes, self.scale]

    def count_bytes(self) -> int:
        """Return the bytes of the packed weights."""
        return sum(part.numel() * part.element_size() for part in self.list_packed())

    def unpack(self) -> Float[Tensor, "O E"]:
        """Return the weights that this map stands for, in float32."""
        raise NotImplementedError

    def finish(self, product: Tensor, like: Tensor) -> Tensor:
        """Return a product of rows with its bias, in the shape of its input."""
        product = product if self.bias is None else product.add_(self.bias)
        return product.view(*like.shape[:-1], self.out_features)


def find_scale(weight: Float[Tensor, "O E"]) -> Tensor:
    """Return a scale per output, of bfloat16: |W * scale - weight| <= scale / 2 for some W of int8.

    Rounded before codes are made, so that it costs nothing; up, so that no code is above 127.
    """
    return (weight.abs().amax(1) / 127 * (1 + torch.finfo(torch.bfloat16).eps)).clamp_min(1e-30).bfloat16()


class Int8Linear(PackedLinear):
    """y = (x @ W.T) * scale + bias, W of int8; x rounded to 2^-14 of a row's largest, as two integers (math/halves.py).

    Cost: a byte per weight, by FBGEMM, for twice the rows.
    """

    def __init__(self, source: nn.Linear):
        super().__init__(source)
        weight = source.weight.detach().float()
        scale, zeros = find_scale(weight), torch.zeros(self.out_features, dtype=torch.int64)
        with warnings.catch_warnings():
            # torch means to remove such tensors; a torch without them has `PortableInt8Linear`.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            codes = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
        # Nobody can write to them.
        self.maps: Any = torch.ops.quantized.linear_prepack(codes, None)
        self.register_buffer("codes", codes.int_repr().view(-1)[:: max(1, weight.numel() // SAMPLED)].clone())
        self.register_buffer("scale", scale)

    @staticmethod
    @cache
    def is_possible() -> bool:
        """Return whether torch has FBGEMM here, tried on a small map: its builds for x86 do."""
        if torch.backends.quantized.engine not in ("x86", "fbgemm"):
            return False
        try:
            return bool(Int8Linear(nn.Linear(4, 4))(torch.ones(1, 4)).isfinite().all())
        except (AttributeError, RuntimeError):
            return False

    def count_bytes(self) -> int:
        """Return the bytes of the packed weights: those of `codes` are some of them."""
        return self.in_features * self.out_features + self.scale.numel() * self.scale.element_size()

    def unpack(self) -> Float[Tensor, "O E"]:
        """Return the weights that this map stands for."""
        return torch.ops.quantized.linear_unpack(self.maps)[0].dequantize()

    def forward(self, x: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows O"]:
        """Return the product, in the dtype of `x`; a row that is not finite has no finite product."""
        rows = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:-1], self.out_features)
        if len(rows) <= BLOCK_ROWS:
            return self._multiply(rows).to(x.dtype).view(shape)
        product = rows.new_empty(len(rows), self.out_features)
        for part, to in zip(rows.split(BLOCK_ROWS), product.split(BLOCK_ROWS), strict=True):
            to.copy_(self._multiply(part))
        return product.view(shape)

    def _multiply(self, rows: Float[Tensor, "N E"]) -> Float32[Tensor, "N O"]:
        if rows.requires_grad and torch.is_grad_enabled():
            raise ConfigError("weights: no gradient passes through packed weights; load the model without --weights")
        by = load_native() or halves
        parts, unit = by.split_rows(rows.float().contiguous())
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        products = multiply(parts, 1.0, halves.HALF + 1, self.maps)
        return by.join_rows(products, unit, None if self.bias is None else self.bias.detach().float())


class PortableInt8Linear(PackedLinear):
    """y = (x @ W.T) * scale + bias, W of int8, x of bfloat16: where torch has no FBGEMM.

    Cost: a byte per weight for up to 16 rows; for more, weights are unpacked block by block and multiplied plainly.
    """

    def __init__(self, source: nn.Linear):
        super().__init__(source)
        weight = source.weight.detach().float()
        scale = find_scale(weight)
        self.register_buffer("codes", (weight / scale[:, None].float()).round_().to(torch.int8))
        self.register_buffer("scale", scale)

    def unpack(self) -> Float[Tensor, "O E"]:
        """Return the weights that this map stands for."""
        return self.codes.float() * self.scale.float()[:, None]

    def forward(self, x: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows O"]:
        """Return the product, in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < MANY_ROWS:
            multiply = torch.ops.aten._weight_int8pack_mm
            return self.finish(multiply(rows.bfloat16(), self.codes, self.scale).to(x.dtype), x)
        product = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, BLOCK_OUTPUTS):
            part = slice(start, start + BLOCK_OUTPUTS)
            # Integers of 8 bits are exact in every dtype that a model has.
            product[:, part] = linear(rows, self.codes[part].to(x.dtype)) * self.scale[part].to(x.dtype)
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
        self.register_buffer("codes", pack(codes.view(self.out_features, self.in_features), 2))
        # The kernel counts codes from -8.
        scales = torch.stack([scale, least + 8 * scale], -1).transpose(0, 1).contiguous()
        self.register_buffer("scale", scales.bfloat16())

    def unpack(self) -> Float[Tensor, "O E"]:
        """Return the weights that this map stands for: the kernel multiplies every input's unit vector."""
        return self._multiply(torch.eye(self.in_features, dtype=torch.bfloat16)).float().T

    def forward(self, x: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows O"]:
        """Return the product, in the dtype of `x`."""
        return self.finish(self._multiply(x.reshape(-1, x.shape[-1]).bfloat16()).to(x.dtype), x)

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.scale)
