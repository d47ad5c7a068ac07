"""The profile file: the once-per-model measurements, in one safetensors file.

In: Gram sums per layer, gain curves. Out: `Profile`, which can be saved and loaded. It holds, per managed layer, the
bilinear skew's leading columns, the keys' mean and the paper's orthogonal skew; the gain curves of every prompt; in
the metadata the model's identity. Skews or curves may be missing. No pickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from farkv._axes import Tensor
from farkv.calibrate.curves import Curves
from farkv.calibrate.losses import Losses
from farkv.errors import ProfileError
from farkv.files import pass_file, write_file
from farkv.math.skew import Gram, solve_bilinear, solve_svd

FORMAT = "farkv-profile-1"
# More columns than this never help; storing all D of both bases would make up most of the file.
MAX_COLUMNS = 64


@dataclass(frozen=True)
class Profile:
    """Skews of every profiled layer, float32 on the CPU, batch axis 1, and gain curves.

    `identity` identifies the measured model: family, shape and a digest of some weights. `measured` are the curves,
    `limited` the losses of limited layers; each may be None.
    """

    identity: dict[str, str]
    tensors: dict[str, Tensor] = field(repr=False)
    path: str | None = None
    measured: Curves | None = field(default=None, repr=False)
    limited: Losses | None = field(default=None, repr=False)

    @property
    def has_skew(self) -> bool:
        """Return whether the profile has skews; a light profile only has curves."""
        return bool(self.tensors)

    def curves(self) -> Curves:
        """Return the gain curves of the calibration prompts.

        Raises:
            ProfileError: there are none: the file is older, or every prompt was too short.
        """
        if self.measured is None:
            raise ProfileError(
                f"profile {self.path or ''}: has no gain curves; create a new one, with prompts longer than the "
                "observation window: farkv profile"
            )
        return self.measured

    def losses(self) -> Losses:
        """Return the measured loss of limiting each layer.

        Raises:
            ProfileError: losses were not measured.
        """
        if self.limited is None:
            raise ProfileError(
                f"profile {self.path or ''}: has no measured losses; create a new one: farkv profile --losses 8"
            )
        return self.limited

    def bilinear(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return A_q, A_k ([1, Hkv, D, up to 64]) and the key mean ([1, Hkv, 1, D])."""
        return self._get(layer, "query"), self._get(layer, "key"), self._get(layer, "mean")

    def svd(self, layer: int) -> Tensor:
        """Return the paper's orthogonal skew, [1, Hkv, D, D]."""
        return self._get(layer, "svd")

    def _get(self, layer: int, name: str) -> Tensor:
        tensor = self.tensors.get(f"layer.{layer}.{name}")
        if tensor is None:
            raise ProfileError(f"profile {self.path or ''}: lacks layer {layer}; create a new one: farkv profile")
        return tensor

    def check(self, identity: dict[str, str]) -> None:
        """Raise ProfileError unless the profile was measured on a model with this identity."""
        for key, expected in identity.items():
            if self.identity.get(key) != expected:
                raise ProfileError(
                    f"profile {self.path or ''}: {key} is {self.identity.get(key)!r}, the model's is {expected!r}; "
                    "create one for this model: farkv profile"
                )

    def save(self, path: str | Path) -> None:
        """Write the profile; a reader sees the old file or the whole new one; on StoreError the old one."""
        tensors, metadata = self.tensors, {"format": FORMAT, "identity": json.dumps(self.identity)}
        if self.measured is not None:
            tensors = tensors | self.measured.to_tensors()
            metadata["curves"] = self.measured.notes
        if self.limited is not None:
            tensors = tensors | self.limited.to_tensors()
            metadata["losses"] = self.limited.notes
        write_file(path, save(tensors, metadata), "profile")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: the file does not exist, is damaged, or is not a profile.
        """
        try:
            with pass_file(path) as name, safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ProfileError(f"profile {path}: expected format {FORMAT}, got {metadata.get('format')!r}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                identity = json.loads(metadata["identity"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ProfileError(f"profile {path}: cannot be read ({error}); create a new one: farkv profile") from error
        skews = {name: tensor for name, tensor in tensors.items() if not name.startswith(("curves.", "losses."))}
        try:
            has_curves, has_losses = ("curves.keep" in tensors, "losses.keep" in tensors)
            measured = Curves.from_tensors(tensors, metadata.get("curves", "")) if has_curves else None
            limited = Losses.from_tensors(tensors, metadata.get("losses", "")) if has_losses else None
        except ProfileError as error:
            raise ProfileError(f"profile {path}: {error}") from error
        return cls(identity, skews, str(path), measured, limited)


def make_profile(grams: dict[int, Gram], identity: dict[str, str], curves: Curves | None = None) -> Profile:
    """Solve for the skews of every layer from its summed moments; curves are stored unchanged.

    Cost: per KV head two Cholesky factorisations, an SVD and an eigenproblem, all D x D.
    """
    tensors: dict[str, Tensor] = {}
    for layer, gram in grams.items():
        query, key, mean = solve_bilinear(gram)
        columns = slice(0, MAX_COLUMNS)
        parts = {"query": query[..., columns], "key": key[..., columns], "mean": mean, "svd": solve_svd(gram)}
        for name, tensor in parts.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ProfileError(f"layer {layer}: the skew is not finite; use longer or more varied prompts")
            tensors[f"layer.{layer}.{name}"] = tensor.contiguous()
    return Profile(identity, tensors, measured=curves)
