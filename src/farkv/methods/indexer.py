"""The model's own indexer: a model that was trained to choose what it reads chooses, and nothing else travels.

The steps, per layer:
  every pass         the model's indexer takes the new tokens' keys, and is handed those of all   (`store.near.indexer`)
                     it hides what it does not choose from the attention mask
  every decode step  what the mask still shows is fetched and read; a prompt is read whole, by that mask

Nothing is estimated ahead: an indexer asks by the hidden state of its own layer. Nothing is scored here: a record is
shown or hidden. A cap below the model's budget is kept by the door, which asks the same indexer for fewer blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from farkv._axes import Bool, Float32, Shaped, Tensor
from farkv.config import check_fraction
from farkv.errors import ConfigError, SessionError
from farkv.math.step import Query, Step
from farkv.methods.base import Cap, Place, Records, Selector
from farkv.store.near.indexer import PLACE_BYTES, IndexerKeys
from farkv.store.sizes import LayerShape


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Attend to the records that the model's own trained indexer chooses (Qwen4-Exp), as the plain model does.

    Args:
        fraction: hard cap on the KV bytes read per step, below the model's budget; None: the model's budget alone.
            1.0: every record is read, and those hidden that the model did not choose: bit for bit the plain model.
    """

    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None:
            check_fraction(self.fraction)


class IndexerSelector(Selector):
    """Reads what the model's indexer left of the mask, and the newest record, which is at hand."""

    # The model has chosen: a page on disk that it wants is read.
    limits_pages = False
    note = "each layer's own indexer chooses when the layer runs: nothing is fetched ahead of it"

    def __init__(self, config: Any, place: Place):
        if place.indexer is None:
            raise ConfigError(
                "indexer: expected a model that was trained with an indexer of its own, got none; use InfiniGen()"
            )
        self.config, self.place, self.form, self.followers = config, place, place.indexer, {}
        # All that was asked for is all: read by the same mask, so that nothing differs from the plain model.
        self.hides = config.fraction != 1
        most = self.form.most if self.hides else None
        self.cap = Cap(1.0 if config.fraction is None else config.fraction, most=most)
        self.index = {i: IndexerKeys(place.ledger, place.device, place.reserve_tokens) for i in place.layers}
        self.followers |= self.index
        # What the model shows of a layer's tokens at the step that runs.
        self.shown: dict[int, Bool[Tensor, "b S"]] = {}

    # --- every layer, every step ----------------------------------------------------------------------------

    def take_choice(self, records: Records, step: Step) -> None:
        """Take what the model's indexer chose for a decode step."""
        assert step.mask is not None
        self.shown[records.layer] = step.mask[:, 0, -1]

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """Score what is shown 0, and what is hidden -inf: all KV heads read the same."""
        shown = self.shown.pop(records.layer)[:, None, :n_rows]
        scores = torch.zeros(records.shape.batch, records.shape.kv_heads, n_rows, device=shown.device)
        return scores.float().masked_fill_(~shown, -torch.inf)

    def observe(self, records: Records, step: Step) -> None:
        """Store the indexer's keys of the new tokens: the pass is admitted."""
        self.index[records.layer].settle()

    # --- bytes ----------------------------------------------------------------------------------------------

    def count_scored_bytes(self, records: Records, n_rows: int) -> int:
        """Return the bytes of the keys that the model's indexer reads."""
        return records.shape.batch * n_rows * self.form.dim * records.shape.itemsize

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Return the bytes of one layer's indexer keys, and its part of the positions, which one keeps for all."""
        places = -(-PLACE_BYTES // max(1, len(self.place.layers)))
        return shape.batch * tokens * (self.form.dim * shape.itemsize + places)

    # --- joining, sessions ------------------------------------------------------------------------------------

    def join(self, other: Any, layer: int, batches: tuple[int, int], lengths: tuple[int, int]) -> None:
        """Let another's sequences follow these."""
        self.index[layer].join(other.index[layer], max(lengths), batches)

    def describe(self) -> dict[str, Any] | None:
        """Return what must be the same for saved keys to be of use."""
        return {"indexer": list(self.form)}

    def list_tensors(self, records: Mapping[int, Records]) -> dict[str, Tensor]:
        """Return the indexer's keys of every layer by name, and the positions."""
        found = {f"{i}/keys": each.keys.view().to("cpu") for i, each in self.index.items()}
        return found | {f"{i}/places": e.places.view().to("cpu") for i, e in self.index.items() if e.places.length}

    def take_tensors(self, tensors: dict[str, Tensor], dtype: torch.dtype, records: Mapping[int, Records]) -> None:
        """Take the keys of a saved text, whose records are stored.

        Raises:
            SessionError: these tensors are not of this method and text.
        """
        first = self.place.layers[0]
        n = records[first].length
        expected = {f"{i}/keys": ((1, 1, n, self.form.dim), dtype) for i in self.index}
        expected[f"{first}/places"] = (1, 1, n, 3), torch.int64
        got = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if got != expected or not all(is_finite(t) for t in tensors.values()):
            raise SessionError(
                f"its indexer keys: expected {expected}, got {got} or numbers that are none; make it anew"
            )
        for i, each in self.index.items():
            each.keys.append(tensors[f"{i}/keys"].to(self.place.device))
        self.index[first].places.append(tensors[f"{first}/places"].to(self.place.device))


def is_finite(values: Shaped[Tensor, "b h S R"]) -> bool:
    """Say whether there is neither NaN nor infinity among these values."""
    return bool(torch.isfinite(values).all())
