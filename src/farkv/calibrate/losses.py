"""Measured losses: what it costs the model's output when one layer alone is limited to a share of its records.

In: per prompt and layer, KL at a few shares. Out: `Losses`, which a profile carries; curves between the shares. Unlike
gains these need not be concave, so budgets are shared by an exact knapsack (`math.knapsack`), not greedily.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64

from farkv._axes import Float32, Tensor
from farkv.errors import ProfileError

# Shares of the context that a layer is limited to while its loss is measured; at 1 there is none.
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
LossKind = Literal["keep", "fetch"]


@dataclass(frozen=True)
class Losses:
    """Mean KL to the full model, in nats per token, with one layer limited to each of `shares`.

    `keep`: to one choice for all steps, scored by the prompt's last queries. `fetch`: to the best choice of each step.
    """

    keep: Float32[Tensor, "L K"] = field(repr=False)
    fetch: Float32[Tensor, "L K"] = field(repr=False)
    shares: tuple[float, ...]
    layers: tuple[int, ...]
    prompts: int

    def interpolate(self, kind: LossKind, cells: Int64[np.ndarray, " M"], grid: int) -> Float64[np.ndarray, "L M"]:
        """Return every layer's loss at cells / grid of the context.

        Linear in the logarithm of the share; a larger share never loses more, which the measurement's noise may break.
        """
        rows = (self.keep if kind == "keep" else self.fetch).double().numpy()
        falling = np.minimum.accumulate(np.maximum(rows, 0.0), axis=1)
        x = np.log(np.array([*self.shares, 1.0]))
        at = np.log(cells / grid)
        return np.stack([np.interp(at, x, np.append(row, 0.0)) for row in falling])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what a profile file holds; `notes` belongs beside it."""
        return {"losses.keep": self.keep.contiguous(), "losses.fetch": self.fetch.contiguous()}

    @property
    def notes(self) -> str:
        """Shares, layers and the number of prompts, as JSON."""
        return json.dumps({"shares": self.shares, "layers": self.layers, "prompts": self.prompts})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], notes: str) -> Losses:
        """Read what `to_tensors` and `notes` gave.

        Raises:
            ProfileError: they do not fit together.
        """
        try:
            about = json.loads(notes)
            shares, layers = tuple(map(float, about["shares"])), tuple(map(int, about["layers"]))
            keep, fetch = tensors["losses.keep"].float(), tensors["losses.fetch"].float()
            prompts = int(about["prompts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"losses: cannot be read ({error!r}); make the profile anew: farkv profile") from error
        for rows in (keep, fetch):
            if tuple(rows.shape) != (len(layers), len(shares)) or not bool(torch.isfinite(rows).all()):
                raise ProfileError(
                    f"losses: expected finite numbers of shape {(len(layers), len(shares))}, got {tuple(rows.shape)}; "
                    "make the profile anew: farkv profile"
                )
        return cls(keep, fetch, shares, layers, prompts)
