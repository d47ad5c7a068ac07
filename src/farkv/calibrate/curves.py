"""Gain curves of many prompts on one grid: how much of a layer's attention its best records hold.

In: per prompt and layer a gain curve, of whatever length the prompt had. Out: `Curves`, which a profile carries.
Prompts of different lengths share one grid because a curve is cut by share of the records, not by their number.

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
    """Cut a gain curve into GRID parts of equal width.

        R(j / N) = g_1 + ... + g_j, linear between;   out_i = R(i / GRID) - R((i - 1) / GRID)

    Args:
        gains: non-increasing; N may be below or above GRID.

    Returns:
        float32 [GRID], non-increasing, the same sum.

    Raises:
        ConfigError: there is no gain.

    Cost: N + GRID log GRID operations.
    """
    n = gains.shape[0]
    if n == 0:
        raise ConfigError("to_grid: expected a curve of one gain or more, got none; give a longer prompt")
    gains = gains.double()
    total = torch.cat((gains.new_zeros(1), gains.cumsum(0)))
    # Whole numbers: i N / GRID falls into gain `below`, `rest` / GRID of the way.
    scaled = torch.arange(GRID + 1, device=gains.device) * n
    below, rest = scaled // GRID, (scaled % GRID).double() / GRID
    curve = total[below] + rest * gains[below.clamp_max(n - 1)]
    # A concave curve's differences do not increase; rounding may swap neighbours.
    return curve.diff().clamp_min(0).sort(descending=True).values.float()


def fill_layers(rows: dict[int, Float32[Tensor, " grid"]], layers: tuple[int, ...]) -> Float32[Tensor, "L grid"]:
    """Return a row for every layer; those between two measured ones lie on the line between them.

    Args:
        rows: the measured layers, the first and the last of `layers` among them.
        layers: all layers, ascending.
    """
    known = sorted(rows)
    filled = []
    for layer in layers:
        low, high = max(i for i in known if i <= layer), min(i for i in known if i >= layer)
        share = (layer - low) / max(high - low, 1)
        filled.append(torch.lerp(rows[low], rows[high], share) if share else rows[low])
    return torch.stack(filled)


@dataclass(frozen=True)
class Curves:
    """The curves of n prompts over L layers; rows do not increase and sum to 1.

    `keep` is the gain of one choice of records for all steps, `spread` that of choosing anew at every step. `tokens`
    are the prompts' lengths, `layers` the layers' numbers, `settings` how it was measured (scorer, window, pool).
    """

    keep: Float32[Tensor, "n L grid"] = field(repr=False)
    spread: Float32[Tensor, "n L grid"] = field(repr=False)
    tokens: Int[Tensor, " n"]
    layers: tuple[int, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return self.keep.shape[0]

    def mean(self, kind: Kind) -> Float32[Tensor, "L grid"]:
        """Return the prompts' mean curve of every layer: a mean of concave curves, so still non-increasing gains."""
        rows = self.keep if kind == "keep" else self.spread
        return _normalise(rows.double().mean(0).sort(-1, descending=True).values).float()

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Curves, Curves]:
        """Split the prompts at random: one part to fit a plan on, the other to calibrate its promise.

        Args:
            fraction: share of the first part; each part gets one prompt at least.
            seed: makes the split reproducible.

        Raises:
            ConfigError: there are fewer than two prompts, or the fraction is not between 0 and 1.
        """
        n = len(self)
        if n < 2 or not 0 < fraction < 1:
            raise ConfigError(
                f"split: expected two prompts or more and a fraction between 0 and 1, got {n} and {fraction}; "
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
        """Return what a profile file holds; `notes` belongs beside it.

        Half precision of the gain over a uniform one: its mean is 1, and rounding is monotone, so rows stay
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
        """Read what `to_tensors` and `notes` gave; rows are normalised again.

        Raises:
            ProfileError: the tensors do not fit together.
        """
        try:
            about = json.loads(notes)
            layers, settings = tuple(int(i) for i in about["layers"]), dict(about["settings"])
            keep, spread = (tensors[f"curves.{kind}"].double() for kind in ("keep", "spread"))
            tokens = tensors["curves.tokens"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"curves: cannot be read ({error!r}); make the profile anew: farkv profile") from error
        shape = (len(tokens) if tokens.dim() == 1 else -1, len(layers), GRID)
        for name, rows in (("keep", keep), ("spread", spread)):
            if tuple(rows.shape) != shape or not bool((rows.isfinite() & (rows >= 0)).all()):
                raise ProfileError(
                    f"curves.{name}: expected finite gains of shape {shape}, got {tuple(rows.shape)}; "
                    "make the profile anew: farkv profile"
                )
        return cls(_normalise(keep).float(), _normalise(spread).float(), tokens, layers, settings)


def _normalise(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return torch.where(total > 0, rows / total, 0.0)
