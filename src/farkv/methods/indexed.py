"""A selector that scores a small index instead of the keys: InfiniGen's, and low-bit keys.

The steps (docs/papers/infinigen.md has equation, function and deviation):
  once per prompt    index: a fitted projection, and codes of every token     (`methods.layer_fit`, a `Coder`)
  every layer, step  score the index with a query, estimated or true          (`math.score`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.config import Source
from farkv.kernels.native import IndexView
from farkv.math.score import pool_group, project_query, score_index
from farkv.math.step import Query, Step
from farkv.methods.base import Cap, ChoiceRule, Place, Records, Selector
from farkv.methods.coder import Coder
from farkv.methods.gains import Trial
from farkv.methods.index_tensors import join_fits, list_tensors, take_tensors
from farkv.methods.layer_fit import LayerFit
from farkv.store.sizes import LayerShape

# Rows whose codes are scored at a time, by plain operations.
SCORED_ROWS = 8192


class IndexRule(NamedTuple):
    """How one method uses an index; its config makes it.

    make_coder: what turns keys into codes, in a place.  source: of the estimated query, where records travel or
    `always_ahead`; None or "query": the true query chooses.  rule, pool: what ends a choice besides the cap, and how a
    query group's scores are joined for it.  dense_first: the first layer is read whole.  sampled: of heads that gain
    by it records are drawn, where the true query chooses.
    """

    cap: Cap
    make_coder: Callable[[Place], Coder]
    source: Source | None = None
    always_ahead: bool = False
    rule: ChoiceRule | None = None
    pool: Callable[[Tensor, Tensor | None], Tensor] = pool_group
    dense_first: bool = False
    sampled: bool = False


class IndexSelector(Selector):
    """Reads sinks, the window and the best records by a query against an index.

    Args:
        config: with an `index_rule`.
    """

    def __init__(self, config: Any, place: Place):
        self.config, self.place = config, place
        use: IndexRule = config.index_rule
        self.cap = use.cap if use.cap.least == 1 or place.travels else use.cap._replace(dense_tokens=place.dense_tokens)
        if use.dense_first:
            self.cap = self.cap._replace(fraction=config.share_beside_dense(len(place.layers)))
        self.rule, self.pool = use.rule, use.pool
        ahead = (place.travels or use.always_ahead) and use.source != "query"
        self.source = use.source if ahead else None
        if ahead or place.device.type != "cpu":
            # What is chosen by an estimate, or counted on a device, is not varied.
            self.cap = self.cap._replace(burst=1.0)
        self.dense_layers = set(place.layers[:1]) if use.dense_first else set[int]()
        self.coder = use.make_coder(place)
        # What is drawn is weighed by how likely that was: a rule, or a count that varies, would not know.
        draws = use.sampled and self.source is None and self.rule is None and place.device.type == "cpu"
        draws = draws and self.cap.burst <= 1 and self.cap.fraction < 1
        trial = Trial(self.cap, self.coder, len(place.layers)) if draws else None
        self.fits = {layer: LayerFit(place, self.coder, layer, trial) for layer in place.layers}
        self.followers = dict(self.fits)
        # The flags of sampled heads that were looked at last, and which are set if any is.
        self._flags: dict[int, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def find_window(cls, config: Any) -> int:
        """Return how many of the newest records are always read, at most."""
        return config.index_rule.cap.window

    # --- once per prompt ------------------------------------------------------------------------------------

    def reads_all(self, layer: int) -> bool:
        """Say whether this layer is read whole by design."""
        return layer in self.dense_layers

    def observe(self, records: Records, step: Step) -> None:
        """1. Sample queries.  2. At the prompt's end fit the projection.  3. Index the new keys."""
        if self.reads_all(records.layer):
            return
        fit = self.fits[records.layer]
        fit.observe(records, step.query, step.k)
        # In place, tokens are indexed in groups when they leave the window; a far token's key is at hand only now.
        waits = step.n_new == 1 and not self.place.travels and self.cap.window > 0
        if not waits and fit.index.projection is not None and fit.index.length == records.length - step.n_new:
            fit.encode(step.k)

    def prepare(self, records: Records, n_rows: int) -> None:
        """Bring a layer's index up to date."""
        self.fits[records.layer].catch_up(records, n_rows)

    # --- every layer, every step ----------------------------------------------------------------------------

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """1. Project the query.  2. Score the codes.  3. Join the query group."""
        return self.pool(self._score_codes(records, query, n_rows), visible)

    def score_late(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """Score by weight, whatever ended the early choice."""
        return pool_group(self._score_codes(records, query, n_rows), visible)

    def _score_codes(self, records: Records, query: Query, n_rows: int) -> Float32[Tensor, "B Hkv G S"]:
        fit = self.fits[records.layer]
        projection = fit.get_projection()
        projected = project_query(query.q, projection.query, query.logits)
        # A block at a time: codes become float32.
        blocks = fit.index.codes()[:, :, :n_rows].split(SCORED_ROWS, 2)
        parts = [score_index(projected, self.coder.decode(block, projection), query.logits) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def view_index(self, layer: int) -> IndexView | None:
        """Return the index for the fast kernels, which look nibbles up in tables."""
        fit = self.fits[layer]
        projection = fit.get_projection()
        if projection.tables.shape[2] == 0:
            return None
        return IndexView(fit.index.rows.get(), projection.query, projection.tables)

    def find_sampled(self, layer: int) -> Bool[Tensor, "b Hkv"] | None:
        """Say which heads are sampled, as it was found at the fit; None where none are."""
        fit = self.fits[layer]
        if fit.trial is None:
            return None
        flags = fit.get_projection().sampled
        if layer not in self._flags or self._flags[layer][0] is not flags:
            drawn = flags[..., 0, 0] > 0
            # A deliberate sync, once per projection.
            self._flags[layer] = flags, drawn if bool(drawn.any()) else None
        return self._flags[layer][1]

    # --- bytes ----------------------------------------------------------------------------------------------

    def count_scored_bytes(self, records: Records, n_rows: int) -> int:
        """Return the bytes of the codes of the first `n_rows` rows."""
        return self.fits[records.layer].index.row_bytes * n_rows

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Return the bytes of one layer's codes."""
        size = self.coder.measure(shape.k_dim, shape.record_bytes)
        return shape.batch * shape.kv_heads * size.count_bytes(shape.itemsize) * tokens

    # --- taking back, joining, sessions -----------------------------------------------------------------------

    def snapshot(self) -> Any:
        """Return what is known of every layer, and its projection: a pass makes new ones."""
        return {layer: (fit.phase, fit.index.projection) for layer, fit in self.fits.items()}

    def restore(self, state: Any) -> None:
        """Put them back."""
        for layer, known in state.items():
            self.fits[layer].restore(*known)

    def join(self, other: Any, layer: int, batches: tuple[int, int], lengths: tuple[int, int]) -> None:
        """Let another's sequences follow these."""
        join_fits(self.fits[layer], other.fits[layer], batches, lengths)

    def describe(self) -> dict[str, Any] | None:
        """Return what must be the same for a saved index to be of use."""
        return self.coder.describe() | {"scans": 2 if self.cap.top_up else 1}

    def list_tensors(self, records: Mapping[int, Records]) -> dict[str, Tensor]:
        """Return the index of every layer by name, as it is saved with a text."""
        found: dict[str, Tensor] = {}
        for layer, fit in self.fits.items():
            found |= {f"{layer}/{name}": t for name, t in list_tensors(fit, records[layer]).items()}
        return found

    def take_tensors(self, tensors: dict[str, Tensor], dtype: torch.dtype, records: Mapping[int, Records]) -> None:
        """Take the index of a saved text, whose records are stored.

        Raises:
            SessionError: these tensors are no index of this method and text.
        """
        for layer, fit in self.fits.items():
            if not self.reads_all(layer):
                start = f"{layer}/"
                mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
                take_tensors(fit, records[layer], mine, dtype)
