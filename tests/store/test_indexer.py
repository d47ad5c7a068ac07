"""The keys of a model's own indexer: what a pass brings waits until it is admitted, and follows the records."""

from __future__ import annotations

import pytest
import torch

from farkv.errors import CacheStateError
from farkv.store.follow import Cropped, Follower
from farkv.store.ledger import Ledger
from farkv.store.near.indexer import IndexerKeys


def make(reserve: int = 0, *, n: int = 5, batch: int = 2) -> tuple[IndexerKeys, torch.Tensor, torch.Tensor]:
    """Return an index of `n` tokens with room for `reserve`, its keys, and its positions."""
    index = IndexerKeys(Ledger("near", None), torch.device("cpu"), reserve)
    keys, places = torch.randn(batch, n, 3), torch.randint(0, 99, (3, batch, n))
    index.take_places(places)
    assert index.extend(keys) is keys, "the first pass is handed its own"
    index.settle()
    return index, keys, places


@pytest.mark.parametrize("reserve", [0, 12])
def test_what_a_pass_brings_is_handed_back_with_all_and_stored_once(reserve: int) -> None:
    index, keys, places = make(reserve)
    assert isinstance(index, Follower)
    for _ in range(6):
        new, at = torch.randn(2, 1, 3), torch.randint(0, 99, (3, 2, 1))
        keys, places = torch.cat([keys, new], 1), torch.cat([places, at], 2)
        index.take_places(places)
        assert torch.equal(index.extend(new), keys)
        assert torch.equal(torch.cat([index.get_keys(0), index.get_keys(1)]), keys)
        index.settle()
        index.settle()
        assert torch.equal(index.keys.view()[:, 0], keys)
        assert torch.equal(index.get_places(), places)  # type: ignore[arg-type]


@pytest.mark.parametrize("reserve", [0, 12])
def test_a_pass_that_is_taken_back_leaves_nothing(reserve: int) -> None:
    index, keys, places = make(reserve)
    index.take_places(torch.cat([places, places[..., :2]], 2))
    index.extend(torch.randn(2, 2, 3))
    index.crop(Cropped(5, 5))
    index.settle()
    assert torch.equal(index.keys.view()[:, 0], keys)
    assert torch.equal(index.get_places(), places)  # type: ignore[arg-type]
    index.crop(Cropped(0, 0))
    assert index.get_places() is None


def test_sequences_are_selected_and_joined_with_their_positions() -> None:
    index, keys, places = make()
    other, more, others = make(n=3, batch=1)
    index.select(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    assert torch.equal(index.keys.view()[:, 0], keys[order])
    assert torch.equal(index.get_places(), places[:, order])  # type: ignore[arg-type]
    index.join(other, 5, (3, 1))
    assert torch.equal(index.keys.view()[3:, 0, 2:], more)
    assert not index.keys.view()[3:, 0, :2].any()
    found = index.get_places()
    assert found is not None
    assert torch.equal(found[:, 3:, 2:], others)
    assert not other.keys.length


def test_nothing_of_it_can_be_evicted() -> None:
    index, _, _ = make()
    with pytest.raises(CacheStateError, match="expected all records to stay"):
        index.keep(torch.zeros(2, 2, 1, dtype=torch.long))
    index.clear()
    assert index.keys.ledger.used == 0
