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
from farkv.errors import ConfigError, ProfileError

GRID = 1000
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
        if n < 2 or not 0 < fraction < 1:
            raise ConfigError(
                f"split: expected at least two prompts and a fraction between 0 and 1, got {n} and {fraction}; "
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
            ProfileError: the tensors are inconsistent.
        """
        try:
            about = json.loads(notes)
            layers, settings = tuple(int(i) for i in about["layers"]), dict(about["settings"])
            keep, spread = (tensors[f"curves.{kind}"].double() for kind in ("keep", "spread"))
            tokens = tensors["curves.tokens"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"curves: cannot be read ({error!r}); create a new profile: farkv profile") from error
        shape = (len(tokens) if tokens.dim() == 1 else -1, len(layers), GRID)
        for name, rows in (("keep", keep), ("spread", spread)):
            if tuple(rows.shape) != shape or not bool((rows.isfinite() & (rows >= 0)).all()):
                raise ProfileError(
                    f"curves.{name}: expected finite gains of shape {shape}, got {tuple(rows.shape)}; "
                    "create a new profile: farkv profile"
                )
        return cls(_normalise(keep).float(), _normalise(spread).float(), tokens, layers, settings)


def _normalise(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return torch.where(total > 0, rows / total, 0.0)
