"""Measured losses: the effect on the model's output of limiting a single layer to a share of its records.

In: per prompt and layer, the KL at a few shares. Out: `Losses`, part of a profile, interpolated between the shares.
Unlike gains they need not be concave, so budgets are divided by an exact knapsack (`math.knapsack`), not greedily.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64

from farkv._axes import Float32, Tensor
from farkv.calibrate.curves import read_layers
from farkv.errors import ProfileError
from farkv.untrusted import parse_json

# The shares of the context at which a layer's loss is measured; at 1 the loss is 0.
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
LossKind = Literal["keep", "fetch"]


@dataclass(frozen=True)
class Losses:
    """Mean KL to the full model, in nats per token, with one layer limited to each of `shares`.

    `keep`: a fixed selection for all steps, scored by the prompt's last queries. `fetch`: each step's best selection.
    """

    keep: Float32[Tensor, "L K"] = field(repr=False)
    fetch: Float32[Tensor, "L K"] = field(repr=False)
    shares: tuple[float, ...]
    layers: tuple[int, ...]
    prompts: int

    def __post_init__(self) -> None:
        shape, rising = (len(self.layers), len(self.shares)), (0.0, *self.shares, 1.0)
        for rows in (self.keep, self.fetch):
            if tuple(rows.shape) != shape or rows.dtype != torch.float32:
                raise ProfileError(
                    f"losses: expected float32 numbers of shape {list(shape)}, got {rows.dtype} of "
                    f"{list(rows.shape)}; create a new profile: farkv profile --losses 8"
                )
            if not bool((torch.isfinite(rows) & (rows >= 0)).all()):
                raise ProfileError(
                    "losses: expected finite losses of at least 0, got others: the model answered with NaN, or the "
                    "file is damaged; create a new profile: farkv profile --losses 8"
                )
        if not self.shares or not all(a < b for a, b in itertools.pairwise(rising)):
            raise ProfileError("losses: expected rising shares between 0 and 1; create a new profile: farkv profile")
        if self.prompts < 1:
            raise ProfileError(f"losses: expected 1 prompt or more, got {self.prompts}; create a new profile")

    def interpolate(self, kind: LossKind, cells: Int64[np.ndarray, " M"], grid: int) -> Float64[np.ndarray, "L M"]:
        """Return every layer's loss at cells / grid of the context.

        Linear in the logarithm of the share, and made non-increasing in the share, which noisy measurements may not be.
        """
        rows = (self.keep if kind == "keep" else self.fetch).double().numpy()
        falling = np.minimum.accumulate(np.maximum(rows, 0.0), axis=1)
        x = np.log(np.array([*self.shares, 1.0]))
        at = np.log(cells / grid)
        return np.stack([np.interp(at, x, np.append(row, 0.0)) for row in falling])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a profile file; `notes` is stored with them."""
        return {"losses.keep": self.keep.contiguous(), "losses.fetch": self.fetch.contiguous()}

    @property
    def notes(self) -> str:
        """Shares, layers and the number of prompts, as JSON."""
        return json.dumps({"shares": self.shares, "layers": self.layers, "prompts": self.prompts})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], notes: str) -> Losses:
        """Restore losses from `to_tensors` and `notes`.

        Raises:
            ProfileError: they are inconsistent.
        """
        try:
            about = parse_json(notes)
            shares, layers, prompts = about["shares"], read_layers(about["layers"]), about["prompts"]
            if not isinstance(shares, list) or not all(type(share) is float for share in shares):
                raise ValueError("expected a list of shares")
            if type(prompts) is not int:
                raise ValueError("expected a number of prompts")
            return cls(tensors["losses.keep"], tensors["losses.fetch"], tuple(shares), layers, prompts)
        except ProfileError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"losses: cannot be read ({error!r}); create a new profile: farkv profile") from error
