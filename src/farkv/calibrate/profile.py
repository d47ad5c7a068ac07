"""The profile file: the once-per-model measurements, in one safetensors file.

In: Gram sums per layer, gain curves. Out: `Profile`, which can be saved and loaded. It holds, per managed layer, the
bilinear skew's leading columns, the keys' mean and the paper's orthogonal skew; the gain curves of every prompt; in
the metadata the model's identity. Skews or curves may be missing. No pickle. A file is loaded by itself where it lies
beside weights, so it carries a digest, and what it holds is checked when it is made and when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from farkv._axes import Tensor
from farkv.calibrate.curves import Curves
from farkv.calibrate.losses import Losses
from farkv.calibrate.skews import MAX_COLUMNS, HeadForm, check_skews
from farkv.calibrate.tensor_file import pack_tensors, unpack_tensors
from farkv.errors import ProfileError
from farkv.files import read_file, write_file
from farkv.math.skew import Gram, solve_bilinear, solve_svd
from farkv.untrusted import parse_json

FORMAT = "farkv-profile-2"
FILE_NAME = "profile.safetensors"
# A hundred layers of 128 KV heads of 128 take half of it.
MAX_BYTES = 4 * 2**30
_KEYS = {"format", "digest", "identity", "curves", "losses"}
_CURVES = ("curves.keep", "curves.spread", "curves.tokens")
_LOSSES = ("losses.keep", "losses.fetch")


def find_beside(model: str | Path) -> Path:
    """Return where a model's profile lies: in its folder, or beside its file, of which a folder may hold several."""
    path = Path(model)
    return path.with_name(f"{path.stem}.{FILE_NAME}") if path.suffix.lower() == ".gguf" else path / FILE_NAME


@dataclass(frozen=True)
class Profile:
    """Skews of every profiled layer, float32 on the CPU, batch axis 1, and gain curves.

    `identity` identifies the measured model: family, shape and a digest of some weights. `measured` are the curves,
    `limited` the losses of limited layers; each may be None.

    Raises:
        ProfileError: it cannot be one: a layer is not whole, a form or number is impossible, a skew is none.
    """

    identity: dict[str, str]
    tensors: dict[str, Tensor] = field(repr=False)
    path: str | None = None
    measured: Curves | None = field(default=None, repr=False)
    limited: Losses | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        whole = isinstance(self.identity, dict) and isinstance(self.tensors, dict)
        if not whole or not all(isinstance(text, str) for pair in self.identity.items() for text in pair):
            raise ProfileError(
                f"{self._name}: expected an identity of texts, and tensors by name; create a new one: farkv profile"
            )
        try:
            check_skews(self.tensors)
        except ValueError as error:
            raise ProfileError(f"{self._name}: {error}; create a new one: farkv profile") from error

    @property
    def _name(self) -> str:
        return f"profile {self.path}" if self.path else "profile"

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
                f"{self._name}: has no gain curves; create a new one, with prompts longer than the "
                "observation window: farkv profile"
            )
        return self.measured

    def losses(self) -> Losses:
        """Return the measured loss of limiting each layer.

        Raises:
            ProfileError: losses were not measured.
        """
        if self.limited is None:
            raise ProfileError(f"{self._name}: has no measured losses; create a new one: farkv profile --losses 8")
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
            raise ProfileError(f"{self._name}: lacks layer {layer}; create a new one: farkv profile")
        return tensor

    def check(self, identity: dict[str, str]) -> None:
        """Raise ProfileError unless the profile was measured on a model with this identity."""
        for key, expected in identity.items():
            if self.identity.get(key) != expected:
                raise ProfileError(
                    f"{self._name}: {key} is {self.identity.get(key)!r}, the model's is {expected!r}; "
                    "create one for this model: farkv profile"
                )

    def check_layers(self, layers: Mapping[int, HeadForm]) -> None:
        """Raise ProfileError unless every skew fits the model's managed layers; without skews there is none to fit."""
        found = check_skews(self.tensors) if self.has_skew else layers
        if list(found) != sorted(layers):
            raise ProfileError(
                f"{self._name}: is of layers {list(found)}, the model's are {sorted(layers)}; create one for this "
                "model: farkv profile"
            )
        for layer, form in found.items():
            if form != layers[layer]:
                raise ProfileError(
                    f"{self._name}: layer {layer} is of {form}, the model's has {layers[layer]}; create one for this "
                    "model: farkv profile"
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
        write_file(path, pack_tensors(tensors, metadata), "profile")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: the file does not exist, is damaged, or is not a profile.
        """
        try:
            tensors, metadata = unpack_tensors(read_file(path, MAX_BYTES), FORMAT)
            if not metadata.keys() <= _KEYS:
                raise ValueError(f"expected no more than {', '.join(sorted(_KEYS))}, got {sorted(metadata)}")
            identity = parse_json(metadata["identity"])
            if not isinstance(identity, dict):
                raise ValueError("expected an identity of texts")
            curves = {name: tensors.pop(name) for name in _CURVES if "curves" in metadata}
            losses = {name: tensors.pop(name) for name in _LOSSES if "losses" in metadata}
        except (OSError, ValueError, KeyError) as error:
            raise ProfileError(f"profile {path}: cannot be read ({error}); create a new one: farkv profile") from error
        try:
            measured = Curves.from_tensors(curves, metadata["curves"]) if curves else None
            limited = Losses.from_tensors(losses, metadata["losses"]) if losses else None
        except ProfileError as error:
            raise ProfileError(f"profile {path}: {error}") from error
        return cls(identity, tensors, str(path), measured, limited)


def make_profile(grams: dict[int, Gram], identity: dict[str, str], curves: Curves | None = None) -> Profile:
    """Solve for the skews of every layer from its summed moments; curves are stored unchanged.

    Cost: per KV head two Cholesky factorisations, an SVD and an eigenproblem, all D x D.
    """
    tensors: dict[str, Tensor] = {}
    for layer, gram in grams.items():
        # A norm that overflows says so too.
        if not all(bool(torch.isfinite(moment).all()) for moment in (gram.queries, gram.keys, gram.key_sum)):
            raise ProfileError(
                f"layer {layer}: its queries or keys are not finite, so there is no skew; look for NaN in the weights, "
                "or load the model in a dtype of more range (bfloat16, float32)"
            )
        query, key, mean = solve_bilinear(gram)
        columns = slice(0, MAX_COLUMNS)
        parts = {"query": query[..., columns], "key": key[..., columns], "mean": mean, "svd": solve_svd(gram)}
        tensors |= {f"layer.{layer}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    return Profile(identity, tensors, measured=curves)
