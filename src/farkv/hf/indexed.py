"""Layers of a model that was trained with an indexer of its own (Qwen4-Exp): it chooses, and we read no more.

In: the indexer's keys, positions and masks, as the model hands them to its cache and attention. Out: the same keys of
all tokens; a step whose mask is the choice. A cap below the model's budget is kept by asking its indexer again, for
fewer blocks.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from farkv._axes import Bool, Int, Shaped, Tensor
from farkv.errors import CacheStateError, UnsupportedModelError
from farkv.hf import _compat
from farkv.hf.arguments import find_cache
from farkv.hf.attention import read_mask
from farkv.hf.layer import FarLayer, out_of_inference
from farkv.math.step import AttentionFunction, OwnChoice, Step
from farkv.methods.indexer import IndexerSelector
from farkv.methods.records import IndexerForm
from farkv.store.near.indexer import IndexerKeys


class IndexedLayer(FarLayer):
    """One managed layer whose attention sees what the model's own indexer chose."""

    # Of the pass that runs: the mask before the indexer chose; what it chose, where some of that went for a cap.
    seen: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def selector(self) -> IndexerSelector:
        """Return the engine's."""
        selector = self.engine.selector
        assert isinstance(selector, IndexerSelector)
        return selector

    @property
    def index(self) -> IndexerKeys:
        """Return the keys of this layer's indexer."""
        return self.selector.index[self.layer]

    @property
    def indexer_position_ids(self) -> Int[Tensor, "P B S"] | None:
        """Return the positions of all tokens, which the model keeps with its first such layer; None before the first.

        Those of a pass count once they are stored.
        """
        return self.index.get_places()

    @indexer_position_ids.setter
    def indexer_position_ids(self, places: Int[Tensor, "P B S"]) -> None:
        """Take the positions of all tokens, new ones included."""
        with out_of_inference():
            self.index.take_places(places)

    def update_indexer(self, indexer_key_states: Shaped[Tensor, "B T R"]) -> Shaped[Tensor, "B S R"]:
        """Take the indexer's new keys and return all of this layer."""
        with out_of_inference():
            return self.index.extend(indexer_key_states)

    def note_mask(self, mask: Tensor | None) -> None:
        """Note what the new tokens see, before the indexer chooses."""
        self.seen, self.chosen = mask, None

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Let the engine attend to what is chosen."""
        seen, chosen, self.seen, self.chosen = self.seen, self.chosen, None, None
        if seen is None or step.mask is None:
            raise CacheStateError(
                f"layer {self.layer}: expected a mask, from which the model's indexer has chosen, got none; this "
                "release of transformers cannot be followed here, use an ordinary cache"
            )
        return super().attend(step._replace(own=OwnChoice(read_mask(seen), chosen)), attention)


def find_form(attention: dict[int, nn.Module], layers: list[int], name: str) -> IndexerForm:
    """Return the form of a model's own indexers, which is that of all these layers.

    Raises:
        UnsupportedModelError: it has none, or of a kind that is not known.
    """
    forms = {_compat.describe_indexer(attention[i]) for i in layers}
    if len(forms) != 1 or None in forms:
        got = "no layer of that type" if not layers else "indexers of another kind, or of several"
        raise UnsupportedModelError(
            f"{name}: expected a model that was trained with an indexer of blocks of tokens (layers of type "
            f"indexed_attention, as Qwen4-Exp has), got {got}; use another method, such as attach(model, InfiniGen())"
        )
    (form,) = forms
    assert form is not None
    return IndexerForm(*form)


# --- a cap below the model's budget ------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What an indexer was called with at a decode step: hidden states, rotary tables of all tokens, the mask."""

    hidden: Shaped[Tensor, "B 1 E"]
    tables: tuple[Tensor, Tensor]
    mask: Tensor

    def of(self, i: int) -> Asked:
        """Return one sequence's part of it."""
        rows = slice(i, i + 1)
        return Asked(self.hidden[rows], (self.tables[0][rows], self.tables[1][rows]), self.mask[rows])


class KeysOnly:
    """The cache of an indexer that is asked again: it holds the keys already."""

    def __init__(self, keys: Tensor):
        self.keys = keys

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        """Return the keys that are there."""
        return self.keys


def make_narrow(i: int) -> Any:
    """Return a hook of layer i's indexer that keeps a decode step's choice within the cap."""

    def narrow(indexer: nn.Module, args: Any, kwargs: dict[str, Any], shown: Tensor) -> Tensor | None:
        cache: Any = find_cache(args, kwargs)
        if cache is None or shown.shape[2] != 1:
            return None
        layer = cache.layers[i]
        asked = Asked(args[0], args[1], args[2])
        seen = read_mask(asked.mask)
        assert seen is not None
        rows = [narrow_one(indexer, layer, b, asked.of(b), (seen[b], shown[b])) for b in range(shown.shape[0])]
        found = torch.stack(rows)
        # A deliberate sync: the model's indexer makes one for every sequence.
        layer.chosen = None if bool((found == shown).all()) else shown
        return found

    return narrow


def narrow_one(indexer: nn.Module, layer: IndexedLayer, i: int, asked: Asked, masks: tuple[Tensor, Tensor]) -> Tensor:
    """Return what sequence `i` may read of its choice, [1, 1, S]: the best blocks, and the tokens behind the last one.

    A cap of less than a block reads the newest tokens.

    Args:
        masks: what the sequence sees, and what of that the model chose, [1, 1, S] each.
    """
    seen, shown = masks
    tokens = seen[0, 0].nonzero()[:, 0]
    n, block = len(tokens), layer.selector.form.block
    cap = layer.engine.count_cap(layer.layer, n)
    if count_read(shown, tokens) <= cap:
        return shown
    # The newest record is read, chosen or not: where no token is behind the last block, it takes a place.
    blocks = (cap - (n % block or 1)) // block
    if blocks < 1:
        return torch.zeros_like(shown).index_fill_(2, tokens[max(0, n - cap) :], value=True)
    # A copy of the module, whose weights are the same: other threads ask it too.
    fewer: Any = copy.copy(indexer)
    fewer.block_topk, fewer.token_budget = blocks, blocks * block
    keys = layer.index.get_keys(i)
    found = type(indexer).forward(fewer, *asked, KeysOnly(keys))[0]
    if count_read(found, tokens) > cap:
        raise CacheStateError(
            f"layer {layer.layer}: its indexer was asked for at most {cap} tokens and chose {int(found.sum())}; this "
            "release of transformers cannot be capped, leave fraction out"
        )
    return found


def count_read(shown: Bool[Tensor, "1 1 S"], tokens: Int[Tensor, " n"]) -> int:
    """Return how many records of a choice are read: the newest is, chosen or not."""
    return int(shown[0, 0, tokens].sum()) + (0 if bool(shown[0, 0, tokens[-1]]) else 1)
