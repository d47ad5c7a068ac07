"""Quantised records: each row is rounded by itself, in groups of 32 values, K and V separately.

In: keys and values of any tokens. Out: rows of bytes, and decoded values. A row is decoded from its own bytes alone, so
rows can be appended, moved, evicted and paged like any others.

A row is [codes of K | codes of V | params of K | params of V]. Params are the parameters of the groups, in bfloat16;
they start at an even byte.

int8   params = steps, one per group; x ~ code * step, with a signed code in [-127, 127]
int4   params = steps of all groups, then their minima (low); x ~ low + code * step, with a code in [0, 15]. In a group
       of n values, byte j holds code j in its low half and code j + ceil(n / 2) in its high half.

The last group is shorter where the head dimension is no multiple of 32. Steps are rounded up and minima down, so that
nothing is clipped, and for every value (finite; float32 up to 1e38)

    |x - decoded| <= step / 2 * (1 + 2^-7) + the rounding of the model's dtype at `decoded`

A value that is not finite, or in int4 a range that overflows, makes its own group, and no other, decode to NaN: what
was no number does not become one.

Why not the quantised tensors of torchao or quanto: here the unit is one record. Rows are appended while the model
runs, gathered by position, moved at evictions, and written to files page by page: a row's layout must be fixed, in
one uint8 tensor. A quantised tensor type stores codes and scales apart and hides its layout; each of these steps would
have to take it apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from farkv._axes import Float, Tensor
from farkv.errors import ConfigError

GROUP = 32
# Values converted at a time: float32 scratch that fits a core's cache, not charged to any ledger.
PIECE = 1 << 19
# The least step: the smallest normal number, whose reciprocal is finite too.
TINY = 2.0**-126
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CodeForm(NamedTuple):
    """How values in groups, [..., n, g], are written: codes (uint8), and `n_params` parameters per group ([..., n])."""

    bits: int
    n_params: int
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[..., Tensor]


def _round_up(x: Tensor) -> Tensor:
    """Return the least bfloat16 that is not below x >= 0, in float32."""
    # The upper half of a float32 is a bfloat16; any bit set in the lower half carries into it.
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _round_down(x: Tensor) -> Tensor:
    """Return the greatest bfloat16 that is not above x, in float32."""
    cut = (x.view(torch.int32) & -0x10000).view(torch.float32)
    return torch.where(x < 0, -_round_up(-x), cut)


def _make_step(size: Tensor) -> Tensor:
    """Return the step for values of this size, NaN where it is not finite."""
    step = _round_up(size).clamp(min=TINY)
    return torch.where(step.isfinite() & size.isfinite(), step, torch.nan)


def _pack_int8(x: Tensor) -> tuple[Tensor, ...]:
    step = _make_step(x.abs().amax(-1, keepdim=True) / 127)
    # NaN has no integer: it is 0, so that equal records have equal bytes.
    codes = (x * step.reciprocal()).round_().nan_to_num_(nan=0.0).to(torch.int8)
    return codes.view(torch.uint8), step.squeeze(-1)


def _unpack_int8(codes: Tensor, size: int, step: Tensor) -> Tensor:
    # Exact in float32: a code has 7 bits and a step 8.
    return codes.view(torch.int8).float().mul_(step[..., None])


def _pack_int4(x: Tensor) -> tuple[Tensor, ...]:
    low = _round_down(x.amin(-1, keepdim=True))
    step = _make_step((x.amax(-1, keepdim=True) - low) / 15)
    codes = (x - low).mul_(step.reciprocal()).round_().nan_to_num_(nan=0.0).to(torch.int8).view(torch.uint8)
    half = -(-codes.shape[-1] // 2)
    packed = codes[..., :half].clone()
    packed[..., : codes.shape[-1] - half] |= codes[..., half:] << 4
    return packed, step.squeeze(-1), low.squeeze(-1)


def _unpack_int4(codes: Tensor, size: int, step: Tensor, low: Tensor) -> Tensor:
    half = codes.shape[-1]
    x = torch.empty(*codes.shape[:-1], size, dtype=torch.float32, device=codes.device)
    x[..., :half] = codes & 15
    x[..., half:] = codes[..., : size - half] >> 4
    return x.mul_(step[..., None]).add_(low[..., None])


FORMS = {"int8": CodeForm(8, 1, _pack_int8, _unpack_int8), "int4": CodeForm(4, 2, _pack_int4, _unpack_int4)}


def _code_bytes(bits: int, dim: int) -> int:
    return -(-dim * bits // 8)


def _param_bytes(n_params: int, dim: int) -> int:
    return 2 * n_params * -(-dim // GROUP)


def _params_start(bits: int, k_dim: int, v_dim: int) -> int:
    n_bytes = _code_bytes(bits, k_dim) + _code_bytes(bits, v_dim)
    return n_bytes + n_bytes % 2


def encoded_bytes(name: str, k_dim: int, v_dim: int) -> int:
    """Return the bytes of one encoded record.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in FORMS:
        raise ConfigError(f"quantization: expected one of {', '.join(FORMS)}, got {name!r}; name one of these")
    bits, n_params = FORMS[name][:2]
    return _params_start(bits, k_dim, v_dim) + _param_bytes(n_params, k_dim) + _param_bytes(n_params, v_dim)


@dataclass(frozen=True)
class Codec:
    """How one record is stored: rounded to int8 or int4 per group of 32 values, K and V apart.

    Raises:
        ConfigError: the name is not known, or the error bound does not hold for the model's dtype.
    """

    name: str
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        encoded_bytes(self.name, self.k_dim, self.v_dim)
        if self.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ConfigError(
                f"quantization: expected records of {known}, got {self.dtype}; load the model in one of these, "
                "or store its records as they are"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of an encoded record."""
        return encoded_bytes(self.name, self.k_dim, self.v_dim)

    def encode(self, k: Float[Tensor, "B Hkv T Dk"], v: Float[Tensor, "B Hkv T Dv"]) -> Tensor:
        """Return the rows as bytes, uint8 [B, Hkv, T, row_bytes], on the device of `k`.

        Cost: a few passes over pieces that fit the CPU's cache; row_bytes written per record.
        """
        assert k.shape[-1] == self.k_dim and v.shape[-1] == self.v_dim
        rows = torch.empty(*k.shape[:-1], self.row_bytes, dtype=torch.uint8, device=k.device)
        # Padding where the codes have an odd number of bytes: zero, so that equal records have equal bytes.
        rows[..., sum(self._code_widths) : self._params_at].zero_()
        for a, b in self._pieces(rows):
            params = self._write(k[:, :, a:b], rows[:, :, a:b], 0)
            params += self._write(v[:, :, a:b], rows[:, :, a:b], self._code_widths[0])
            # Deliberate small copies: params may be unaligned in a row.
            rows[:, :, a:b, self._params_at :] = torch.cat(params, -1).bfloat16().view(torch.uint8)
        return rows

    def decode(self, rows: Tensor) -> Tensor:
        """Return K and V side by side in the model's dtype, [..., Dk + Dv], of rows of bytes [..., row_bytes].

        Cost: a few passes over pieces that fit the CPU's cache; one record written per row.
        """
        assert rows.shape[-1] == self.row_bytes
        out = torch.empty(*rows.shape[:-1], self.k_dim + self.v_dim, dtype=self.dtype, device=rows.device)
        flat, into = (rows, out) if rows.ndim > 1 else (rows[None], out[None])
        for a, b in self._pieces(flat):
            self._read(flat[..., a:b, :], into[..., a:b, :])
        return out

    def measure_error(self, k: Float[Tensor, "B Hkv T Dk"], v: Float[Tensor, "B Hkv T Dv"], rows: Tensor) -> float:
        """Return the largest |x - decoded| over all values that are decoded to a number; waits for the device."""
        worst = torch.zeros((), dtype=torch.float32, device=rows.device)
        for a, b in self._pieces(rows):
            decoded = self.decode(rows[:, :, a:b]).float()
            for x, y in ((k, decoded[..., : self.k_dim]), (v, decoded[..., self.k_dim :])):
                if y.shape[-1]:
                    worst = torch.maximum(worst, (x[:, :, a:b] - y).abs().nan_to_num_(nan=0.0).amax())
        return float(worst)

    @property
    def _code_widths(self) -> tuple[int, int]:
        bits = FORMS[self.name].bits
        return _code_bytes(bits, self.k_dim), _code_bytes(bits, self.v_dim)

    @property
    def _params_at(self) -> int:
        return _params_start(FORMS[self.name].bits, self.k_dim, self.v_dim)

    def _pieces(self, rows: Tensor) -> Iterator[tuple[int, int]]:
        """Cut the tokens, the axis before the last, into pieces."""
        n = rows.shape[-2]
        per_token = max(1, rows[..., :1, :1].numel()) * (self.k_dim + self.v_dim)
        size = max(1, PIECE // per_token)
        return ((a, min(a + size, n)) for a in range(0, n, size))

    def _write(self, x: Tensor, rows: Tensor, at: int) -> list[Tensor]:
        """Write the codes of x from byte `at` of the rows; return the params, all steps before all minima."""
        form, parts = FORMS[self.name], []
        for group in _split(x):
            codes, *params = form.pack(group.float())
            rows[..., at : at + codes.shape[-2] * codes.shape[-1]].unflatten(-1, codes.shape[-2:]).copy_(codes)
            at += codes.shape[-2] * codes.shape[-1]
            parts.append(params)
        return [param for kind in zip(*parts, strict=True) for param in kind]

    def _read(self, rows: Tensor, out: Tensor) -> None:
        form = FORMS[self.name]
        # A deliberate small copy: params may be unaligned in a row.
        params = rows[..., self._params_at :].contiguous().view(torch.bfloat16).float()
        ends = _param_bytes(form.n_params, self.k_dim) // 2
        at = 0
        of_k, of_v = out[..., : self.k_dim], out[..., self.k_dim :]
        for x, kept in ((of_k, params[..., :ends]), (of_v, params[..., ends:])):
            if x.shape[-1] == 0:
                # Of a latent the value is part of the key.
                continue
            by_kind, g = kept.unflatten(-1, (form.n_params, -1)), 0
            for group in _split(x):
                n, size = group.shape[-2:]
                width = n * _code_bytes(form.bits, size)
                codes = rows[..., at : at + width].unflatten(-1, (n, -1))
                values = form.unpack(codes, size, *by_kind[..., g : g + n].unbind(-2))
                if self.dtype == torch.float16:
                    # Half a step above the largest float16 would be infinity.
                    values.clamp_(-65504, 65504)
                group.copy_(values)
                at, g = at + width, g + n


def _split(x: Tensor) -> list[Tensor]:
    """Return views of the whole groups, [..., n, 32], and of the shorter last one, [..., 1, m]."""
    whole = x.shape[-1] // GROUP * GROUP
    parts = [x[..., :whole].unflatten(-1, (-1, GROUP))] if whole else []
    return [*parts, x[..., None, whole:]] if whole < x.shape[-1] else parts
