"""The file of an unfinished measurement, from which it goes on.

In: sums over prompts, or a file. Out: the file, or the sums. It carries a digest as a profile does.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farkv._axes import Tensor
from farkv.calibrate.profile import MAX_BYTES
from farkv.calibrate.tensor_file import pack_tensors, unpack_tensors
from farkv.errors import ProfileError
from farkv.files import read_file, write_file
from farkv.math.skew import Gram
from farkv.names import RefusedError, check_ours
from farkv.quote import quote
from farkv.untrusted import parse_json

PART_FORMAT = "farkv-profile-part-2"
GRAM_PARTS = ("queries", "keys", "key_sum", "n_keys")


class Sums(NamedTuple):
    """The measurements of the prompts so far: summed moments by layer, and one row of curves ([L, GRID]) per prompt."""

    n_done: int
    grams: dict[int, Gram]
    keep: list[Tensor]
    spread: list[Tensor]
    tokens: list[int]
    token_bytes: dict[int, int]


class Part:
    """The file of an unfinished measurement; does nothing without a path."""

    def __init__(self, path: str | Path | None, digest: str):
        self.path = None if path is None else Path(path)
        self.digest = digest
        self._written = time.monotonic()

    def load(self) -> Sums:
        """Return the sums so far.

        Raises:
            ProfileError: the file is damaged or belongs to another measurement.
        """
        if self.path is None:
            return Sums(0, {}, [], [], [], {})
        try:
            # Others may know where it will be: what it says would become the profile.
            check_ours(self.path)
            tensors, about = unpack_tensors(read_file(self.path, MAX_BYTES), PART_FORMAT)
            if about.get("task") == self.digest:
                return unpack_sums(tensors, parse_json(about["sums"]))
        except FileNotFoundError:
            return Sums(0, {}, [], [], [], {})
        except (OSError, LookupError, TypeError, ValueError) as error:
            why = error.strerror if isinstance(error, RefusedError) else f"cannot be read ({error})"
            raise ProfileError(f"resume {quote(self.path)}: {why}; delete it to start over") from error
        raise ProfileError(
            f"resume {quote(self.path)}: expected an unfinished profile of these prompts, settings and model, "
            "got another; delete it to start over, or repeat the original call"
        )

    def write(self, sums: Sums, pause: float = 0.0) -> None:
        """Write the sums unless the last write was less than `pause` seconds ago; the file is replaced atomically."""
        if self.path is None or sums.n_done == 0 or time.monotonic() - self._written < pause:
            return
        tensors, about = pack_sums(sums)
        metadata = {"format": PART_FORMAT, "task": self.digest, "sums": json.dumps(about)}
        # Not for others, so that it is known on resuming who wrote it.
        write_file(self.path, pack_tensors(tensors, metadata), "profile", private=True)
        self._written = time.monotonic()

    def delete(self) -> None:
        """Delete the file: the measurement is complete."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()


def pack_sums(sums: Sums) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sums as named tensors and a dict of the rest."""
    tensors = {f"{i}.{name}": getattr(gram, name) for i, gram in sums.grams.items() for name in GRAM_PARTS}
    if sums.keep:
        tensors |= {"keep": torch.stack(sums.keep), "spread": torch.stack(sums.spread)}
    about = {
        "n_done": sums.n_done,
        "layers": sorted(sums.grams),
        "tokens": sums.tokens,
        "token_bytes": sums.token_bytes,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def unpack_sums(tensors: dict[str, Tensor], about: dict[str, Any]) -> Sums:
    """Restore the sums from `pack_sums`."""
    grams = {i: Gram(*(tensors[f"{i}.{name}"] for name in GRAM_PARTS)) for i in about["layers"]}
    n_curves = len(about["tokens"])
    keep, spread = (list(tensors[name]) if n_curves else [] for name in ("keep", "spread"))
    sizes = {int(i): n for i, n in about["token_bytes"].items()}
    return Sums(about["n_done"], grams, keep, spread, about["tokens"], sizes)
