"""Gain curves of many prompts on one grid: how much of a layer's attention mass its best records hold.

In: per prompt and layer a gain curve of the prompt's length. Out: `Curves`, part of a profile. Prompts of different
lengths fit one grid because a curve is a function of the fraction of records, not of their number.

Source: XKV §1.3; it averages allocations in tokens, we average curves (docs/papers/xkv.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.config import check_seed, is_number, show_value
from farkv.errors import ConfigError, ProfileError
from farkv.untrusted import parse_json

GRID = 1000
# Of a gain and of a sum in half precision.
SLACK = 2e-3
MAX_WINDOW = 2**20
Kind = Literal["keep", "spread"]


def to_grid(gains: Float32[Tensor, " N"]) -> Float32[Tensor, " grid"]:
    """Resample a gain curve to GRID parts of equal width.

        R(j / N) = g_1 + ... + g_j, linear between;   out_i = R(i / GRID) - R((i - 1) / GRID)

    Args:
        gains: non-increasing; N may be below or above GRID.

    Returns:
        float32 [GRID], non-increasing, with the same sum.

    Raises:
        ConfigError: the curve is empty.

    Cost: N + GRID log GRID operations.
    """
    n = gains.shape[0]
    if n == 0:
        raise ConfigError("to_grid: expected a curve of one gain or more, got an empty one; use a longer prompt")
    gains = gains.double()
    total = torch.cat((gains.new_zeros(1), gains.cumsum(0)))
    # In exact integers: i N / GRID lies in gain `below`, `rest` / GRID of the way through it.
    scaled = torch.arange(GRID + 1, device=gains.device) * n
    below, rest = scaled // GRID, (scaled % GRID).double() / GRID
    curve = total[below] + rest * gains[below.clamp_max(n - 1)]
    # A concave curve's differences do not increase, but rounding may swap neighbours: sort.
    return curve.diff().clamp_min(0).sort(descending=True).values.float()


def fill_layers(rows: dict[int, Float32[Tensor, " grid"]], layers: tuple[int, ...]) -> Float32[Tensor, "L grid"]:
    """Return a row for every layer, interpolating linearly between measured layers.

    Args:
        rows: the measured layers, including the first and the last of `layers`.
        layers: all layers, ascending.
    """
    known = sorted(rows)
    filled = []
    for layer in layers:
        low, high = max(i for i in known if i <= layer), min(i for i in known if i >= layer)
        weight = (layer - low) / max(high - low, 1)
        filled.append(torch.lerp(rows[low], rows[high], weight) if weight else rows[low])
    return torch.stack(filled)


@dataclass(frozen=True)
class Curves:
    """The curves of n prompts over L layers; rows are non-increasing and sum to 1.

    `keep` is the gain of a fixed selection of records for all steps, `spread` that of a new selection at every step.
    `tokens` are the prompt lengths, `layers` the layer numbers, `settings` how it was measured (scorer, window, pool).
    """

    keep: Float32[Tensor, "n L grid"] = field(repr=False)
    spread: Float32[Tensor, "n L grid"] = field(repr=False)
    tokens: Int[Tensor, " n"]
    layers: tuple[int, ...]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        check_settings(self.settings, len(self.layers))
        shape = (len(self.tokens), len(self.layers), GRID)
        for name, rows in (("keep", self.keep), ("spread", self.spread)):
            check_gains(name, rows, shape, 1.0)

    def __len__(self) -> int:
        return self.keep.shape[0]

    def mean(self, kind: Kind) -> Float32[Tensor, "L grid"]:
        """Return every layer's mean curve over prompts: a mean of concave curves, so gains are still non-increasing."""
        rows = self.keep if kind == "keep" else self.spread
        return _normalise(rows.double().mean(0).sort(-1, descending=True).values).float()

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Curves, Curves]:
        """Split the prompts at random: one part to fit a plan, the other to calibrate its guarantee.

        Args:
            fraction: size of the first part; each part gets at least one prompt.
            seed: makes the split reproducible.

        Raises:
            ConfigError: there are fewer than two prompts, or the fraction is not between 0 and 1.
        """
        n = len(self)
        check_seed(seed)
        if n < 2 or not is_number(fraction) or not 0 < fraction < 1:
            raise ConfigError(
                f"split: expected at least two prompts and a fraction between 0 and 1, got {n} and "
                f"{show_value(fraction)}; "
                "profile more prompts"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        first = min(max(round(fraction * n), 1), n - 1)
        return self.take(order[:first].sort().values.tolist()), self.take(order[first:].sort().values.tolist())

    def take(self, prompts: Sequence[int]) -> Curves:
        """Return the curves of these prompts, in this order."""
        chosen = torch.tensor(list(prompts), dtype=torch.long)
        return replace(self, keep=self.keep[chosen], spread=self.spread[chosen], tokens=self.tokens[chosen])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a profile file; `notes` is stored with them.

        In half precision, relative to a uniform gain: the mean is then 1, and since rounding is monotone rows stay
        non-increasing.
        """
        return {
            "curves.keep": (self.keep * GRID).half(),
            "curves.spread": (self.spread * GRID).half(),
            "curves.tokens": self.tokens,
        }

    @property
    def notes(self) -> str:
        """Layers and settings, as JSON."""
        return json.dumps({"layers": self.layers, "settings": self.settings})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], notes: str) -> Curves:
        """Restore curves from `to_tensors` and `notes`; rows are normalised again.

        Raises:
            ProfileError: they are inconsistent, or no gains.
        """
        try:
            about = parse_json(notes)
            layers, settings = read_layers(about["layers"]), dict(about["settings"])
            keep, spread = tensors["curves.keep"], tensors["curves.spread"]
            tokens = tensors["curves.tokens"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"curves: cannot be read ({error!r}); create a new profile: farkv profile") from error
        check_tokens(tokens)
        for name, rows in (("keep", keep), ("spread", spread)):
            if rows.dtype != torch.float16:
                raise ProfileError(f"curves.{name}: expected float16 gains, got {rows.dtype}; create a new profile")
            check_gains(name, rows, (len(tokens), len(layers), GRID), GRID)
        keep, spread = (_normalise(rows.double()).float() for rows in (keep, spread))
        return cls(keep, spread, tokens, layers, settings)


def read_layers(numbers: Any) -> tuple[int, ...]:
    """Return layer numbers from JSON: ascending, from 0.

    Raises:
        ValueError: they are none.
    """
    plain = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    if not plain or not numbers or numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise ValueError(f"expected ascending layer numbers, got {str(numbers)[:60]}")
    return tuple(numbers)


def check_tokens(tokens: Tensor) -> None:
    """Raise ProfileError unless these are lengths of prompts."""
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not len(tokens) or not bool((tokens > 0).all()):
        raise ProfileError(
            f"curves.tokens: expected the length of every prompt, int64 and above 0, got {tokens.dtype} of "
            f"{list(tokens.shape)}; create a new profile: farkv profile"
        )


def check_settings(settings: dict[str, Any], n_layers: int) -> None:
    """Raise ProfileError unless what planning reads of the settings can be used."""
    window, sizes = settings.get("window", 0), settings.get("token_bytes", [1] * n_layers)
    counted = type(window) is int and 0 <= window <= MAX_WINDOW
    sized = isinstance(sizes, list) and len(sizes) == n_layers and all(type(n) is int and n > 0 for n in sizes)
    if not (counted and sized):
        raise ProfileError(
            f"curves: expected a window of 0 to {MAX_WINDOW} tokens and the bytes of a token for each of {n_layers} "
            f"layers, got {str(window)[:40]} and {str(sizes)[:60]}; create a new profile: farkv profile"
        )


def check_gains(name: str, rows: Tensor, shape: tuple[int, ...], total: float) -> None:
    """Raise ProfileError unless these are gains: finite, of at least 0, not rising, of the sum `total` (or of 0)."""
    said, got = f"curves.{name}: expected finite gains of shape {list(shape)}", f"{rows.dtype} of {list(rows.shape)}"
    if tuple(rows.shape) != shape or not rows.is_floating_point():
        raise ProfileError(f"{said}, got {got}; create a new profile: farkv profile")
    if not bool((rows.isfinite() & (rows >= 0)).all()):
        raise ProfileError(
            f"{said}, got some that are not: the model computed NaN or infinity on a prompt, or the file is damaged; "
            "look for NaN in the weights, load the model in a dtype of more range, create a new profile: farkv profile"
        )
    rows = rows.double()
    sums = rows.sum(-1)
    # By rounding, neighbours may swap and a sum may be off.
    falls = (rows[..., 1:] <= rows[..., :-1] * (1 + SLACK) + SLACK * total / GRID).all()
    if not bool(falls & (((sums - total).abs() <= SLACK * total) | (sums == 0)).all()):
        raise ProfileError(
            f"curves.{name}: expected gains that do not rise and sum to {total:g} (or to 0), got others; create a new "
            "profile: farkv profile"
        )


def _normalise(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return torch.where(total > 0, rows / total, 0.0)
