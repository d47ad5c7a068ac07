"""Layers are cut back to what all of them hold, whatever each part of them holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farkv.errors import CacheStateError
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.tiers import Store
from farkv.store.whole import crop, cut_layer, find_fault

B, HEADS, DIM, TOKENS = 2, 2, 4, 40


def make_store(**needs: Any) -> Store:
    store = Store([0, 1], StoreLimits(near=1 << 20), torch.device("cpu"), Needs(3, evicts=True, **needs))
    for layer in (0, 1):
        store.append(layer, *torch.randn(2, B, HEADS, TOKENS, DIM).unbind(0))
    return store


def one_more(store: Store, layer: int, *parts: str) -> None:
    """Add a token to some parts of a layer only, as a pass does that is stopped in between."""
    k, v = torch.randn(2, B, HEADS, 1, DIM).unbind(0)
    if "kept" in parts:
        store.kept[layer].append(k, store.seen(layer))
    if "places" in parts:
        store.kept[layer].places.append(torch.zeros(B, HEADS, 1, 1, dtype=torch.int32))
    if "pool" in parts:
        store.pool[layer].append(k, v)
    if "window" in parts:
        store.windows[layer].push(k, v, seen=store.seen(layer))


@pytest.mark.parametrize("parts", [("kept",), ("places",), ("kept", "pool"), ("kept", "pool", "window")])
def test_a_token_that_is_only_in_some_parts_is_cut_from_all(parts: tuple[str, ...]) -> None:
    store = make_store()
    expected = store.rows(1).clone()
    one_more(store, 1, *parts)
    assert find_fault(store)
    for _ in range(2):
        cut_layer(store, 1, TOKENS)
        assert not find_fault(store)
    assert torch.equal(store.rows(1), expected)
    newest = store.windows[1].newest(3, TOKENS)
    assert newest is not None
    assert torch.equal(newest, expected[:, :, -3:])
    assert store.kept[1].places.view()[0, 0, :, 0].tolist() == list(range(TOKENS))


def test_what_is_gone_is_not_there_again() -> None:
    store = make_store()
    store.evict(0, Keep(torch.arange(10, TOKENS).expand(B, HEADS, -1), torch.zeros(B, HEADS, TOKENS - 10), TOKENS - 10))
    with pytest.raises(CacheStateError, match="what came before them was evicted"):
        crop(store, 0, TOKENS - 5)
    with pytest.raises(CacheStateError, match="expected the first 60 tokens to be left, got 40"):
        cut_layer(store, 1, 60)


def test_an_eviction_that_is_stopped_is_a_fault_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    kept = Keep(torch.arange(10, TOKENS).expand(B, HEADS, -1), torch.zeros(B, HEADS, TOKENS - 10), TOKENS - 10)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.pool[0], "keep", fail)
        store.evict(0, kept)
    assert find_fault(store) == "an eviction from layer 0 was stopped half way"
    cut_layer(store, 0, TOKENS)
    assert find_fault(store)
    for layer in (0, 1):
        store.clear(layer)
    assert not find_fault(store)
