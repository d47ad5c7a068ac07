"""What a method is: a `Selector` scores the records that a step may read, an `Evictor` those that may go.

The engine drives. It asks for scores, and does all else: budgets, choosing, fetching, attending, evicting, counting.
A method sees one layer at a time through `Records`. What it keeps per row registers as a follower, which the store
crops, reorders and frees together with the records. docs/methods.md shows a whole method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.config import Rule, Source
from farkv.errors import SessionError
from farkv.kernels.native import IndexView
from farkv.math.keep import join_scores
from farkv.math.select import Choice
from farkv.math.step import Query, Step
from farkv.methods.last_queries import LastQueries
from farkv.methods.records import Place, Records
from farkv.store.follow import Follower
from farkv.store.sizes import LayerShape

# Minimum records per KV head that are read or kept when no budget was given.
LEAST_RECORDS = 64


# A rule that may end a choice before the cap. In: scores, the cap, each sequence's own cap.
ChoiceRule = Callable[[Tensor, int, Tensor | None], Choice]


class Cap(NamedTuple):
    """How much a step may read of the records: `fraction` of them, forced ones included.

    sinks, window: first and newest tokens that are always read, at most a quarter of the cap.  top_up: share of the cap
    that is chosen late, by the true query.  least: records per KV head that are read however small the cap is.
    dense_tokens: up to here everything is read, because choosing takes longer.  only_sinks: no window is forced, so
    sinks may take the whole quarter.  burst: how many times its share a layer's heads may read in one step, where the
    mean over layers and steps stays at `fraction`; 1: all read the same.  most: records per KV head that a step never
    reads more of, however large its share is.
    """

    fraction: float
    sinks: int = 0
    window: int = 0
    top_up: float = 0.0
    least: int = 1
    dense_tokens: int = 0
    only_sinks: bool = False
    burst: float = 1.0
    most: int | None = None


class Selector:
    """Scores the records of one cache. A method overrides `score`, and what else it has."""

    # The hidden state that the next layer's query is estimated from; None: the layer's true query chooses.
    source: Source | None = None
    # None: the cap alone ends a choice.
    rule: ChoiceRule | None = None
    # On a disk, choose only among pages in memory and the few this step may read.
    limits_pages = True
    # Whether a score of -inf says that a record is not read, though the cap has room for it.
    hides = False
    # What a receipt says where records travel.
    note = ""
    # Per-layer state that the store crops, reorders and frees together with the records.
    followers: dict[int, Follower]

    def __init__(self, config: Any, place: Place):
        self.config, self.place = config, place
        self.cap = Cap(config.fraction, getattr(config, "sinks", 0), getattr(config, "window", 0))
        self.followers = {}

    @classmethod
    def find_window(cls, config: Any) -> int:
        """Return how many of the newest records are always read, at most."""
        return getattr(config, "window", 0)

    # --- scoring --------------------------------------------------------------------------------------------

    def score(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """Score the first `n_rows` rows by a query, [B, Hq, 1, D]; the best are read. Padding is hidden afterwards."""
        raise NotImplementedError

    def score_late(
        self, records: Records, query: Query, n_rows: int, visible: Bool[Tensor, "b h S"] | None
    ) -> Float32[Tensor, "B Hkv S"]:
        """Score once more, by the true query, for what is chosen late."""
        return self.score(records, query, n_rows, visible)

    def take_choice(self, records: Records, step: Step) -> None:
        """Take what the model's own indexer chose for a decode step, before `score`; of a model that has one."""

    def observe(self, records: Records, step: Step) -> None:
        """Look at a layer's new tokens, prompt or decode, once they are stored and attended to."""

    def prepare(self, records: Records, n_rows: int) -> None:
        """Be ready to score the first `n_rows` rows."""

    def prepare_eviction(self, records: Records) -> None:
        """Prepare for an eviction while all keys are stored: followers can only keep what they have of all rows."""
        if not self.reads_all(records.layer):
            self.prepare(records, records.length)

    def reads_all(self, layer: int) -> bool:
        """Say whether this layer is read whole by design."""
        return False

    # --- bytes and kernels ----------------------------------------------------------------------------------

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Return the bytes of one layer's index of a context of `tokens`."""
        return 0

    def count_scored_bytes(self, records: Records, n_rows: int) -> int:
        """Return the bytes that scoring the first `n_rows` rows reads."""
        return self.index_bytes(records.shape, n_rows)

    def view_index(self, layer: int) -> IndexView | None:
        """Return the index in the form that the fast kernels choose from; None where they cannot."""
        return None

    def find_sampled(self, layer: int) -> Bool[Tensor, "b Hkv"] | None:
        """Say of which KV heads records are drawn by weight, for every sequence or all alike; None: of none."""
        return None

    # --- taking back, joining, sessions -----------------------------------------------------------------------

    def snapshot(self) -> Any:
        """Return what a pass changes, apart from the rows of `followers`, for `restore`; nothing is copied."""

    def restore(self, state: Any) -> None:
        """Restore what `snapshot` returned; the rows were cropped to it before."""

    def join(self, other: Any, layer: int, batches: tuple[int, int], lengths: tuple[int, int]) -> None:
        """Let another's sequences, of the same method, follow these in a layer; shorter ones get rows before theirs.

        The layer's followers are cleared, for `prepare` to build anew; a method may do better.

        Args:
            batches, lengths: the sequences and rows of both.
        """
        for each in (self, other):
            if layer in each.followers:
                each.followers[layer].clear()

    def describe(self) -> dict[str, Any] | None:
        """Return what must be the same for a saved index to be of use; None for a method that has none."""
        return None

    def list_tensors(self, records: Mapping[int, Records]) -> dict[str, Tensor]:
        """Return the index of every layer by name, as it is saved with a text."""
        return {}

    def take_tensors(self, tensors: dict[str, Tensor], dtype: torch.dtype, records: Mapping[int, Records]) -> None:
        """Take the index of a saved text, whose records are stored.

        Raises:
            SessionError: these tensors are no index of this method and text.
        """
        if tensors:
            raise SessionError("its index was made by a method that has one, this one has none; make it anew")


class KeepRule(NamedTuple):
    """How much of the records a method keeps, and how its layers share that.

    fraction, tokens, retention: the budget: a share of the context, records per KV head summed over layers, or as
    little as holds this share of the observed attention mass.  share: how layers share it.  sinks, window: first and
    newest records that always stay.  least: records that every layer keeps of a prompt that is allocated on its own.
    most_recent: where `fraction` binds however short the context is, the newest records take at most this share of
    it (`window` of them where that is less; 0: as many as the share allows).  by_prompt: shares follow from the
    prompt's own scores, not from `fraction` alone.  grows: decoding never evicts.
    """

    fraction: float
    tokens: int | None = None
    retention: float | None = None
    share: Rule = "uniform"
    sinks: int = 0
    window: int = 1
    least: int = 1
    most_recent: float | None = None
    by_prompt: bool = True
    grows: bool = False


class Evictor:
    """Scores the records of one cache for staying. A method overrides `observe`, and `score` or `rescore`.

    Args:
        config: with a `keep_rule`.
    """

    # Scores are sums that grow by little at a time: they are stored as float32, and the newest records' stay too.
    sums_scores = False
    # All records are read that are kept, so they live near, and attention is dense over them.
    lives_near = True

    def __init__(self, config: Any, place: Place):
        self.config, self.place = config, place
        self.rule: KeepRule = config.keep_rule
        # The latest queries of every layer.
        self.last = {layer: LastQueries() for layer in place.layers}
        self.followers: dict[int, Follower] = dict(self.last)

    def observe(self, records: Records, query: Query) -> None:
        """Look at a pass's queries, before attention."""

    def settle(self, records: Records, scores: Float32[Tensor, "B Hkv S"]) -> None:
        """Look at a layer after attention; `scores` are those of its stored records, to change in place."""

    def score(
        self, layer: int, k: Tensor, v: Tensor, visible: Bool[Tensor, "B h S"] | None, n_recent: int | None = None
    ) -> Float32[Tensor, "B Hkv N"]:
        """Score records by what the layer was asked so far; the best stay.

        Args:
            k, v: of the layer's records, where they are stored.
            n_recent: the newest of them, which stay without a score.
        """
        raise NotImplementedError

    def rescore(self, records: Records, scores: Float[Tensor, "B Hkv S"], n_recent: int) -> Tensor:
        """Bring the stored records' scores up to date in place, before an eviction; return the new ones.

        The larger of a record's new and old score counts, so that importance fades slowly.
        """
        visible, k = records.known(records.length), records.keys(0, records.length)
        visible = None if visible is None else visible.to(k.device)
        new = self.score(records.layer, k, records.values(), visible, n_recent)
        scores[..., : new.shape[-1]] = join_scores(new.to(scores.device), scores)
        return new

    def snapshot(self) -> Any:
        """Return what a pass changes, apart from the rows of `followers`, for `restore`; nothing is copied."""
        return {layer: (last.observed, last.seen) for layer, last in self.last.items()}

    def restore(self, state: Any) -> None:
        """Restore what `snapshot` returned."""
        for layer, (observed, seen) in state.items():
            self.last[layer].observed, self.last[layer].seen = observed, seen
