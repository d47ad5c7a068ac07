"""Followers: they are told what happens to a layer's records, in order; what methods keep per row really follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.methods import XKV, Random
from farkv.methods.full import Full
from farkv.methods.layer_fit import LayerFit
from farkv.methods.table import METHODS, evicts
from farkv.store.far.page_file import DiskSpace
from farkv.store.follow import Cropped, Follower
from farkv.store.placement import Placement
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Store
from farkv.store.whole import crop
from tests.models import make_model, make_prompt, model_for

B, HEADS, D, TOKENS = 2, 2, 4, 20


class Recorder:
    """A follower that writes down what it is told, and what the store holds at that time."""

    def __init__(self, name: str, store: Store, layer: int, told: list[Any]):
        self.name, self.store, self.layer, self.told = name, store, layer, told

    def note(self, what: str, *arguments: Any) -> None:
        self.told.append((self.name, what, *arguments, self.store.length(self.layer)))

    def crop(self, now: Cropped) -> None:
        self.note("crop", now)

    def keep(self, positions: torch.Tensor) -> None:
        self.note("keep", positions.tolist())

    def select(self, sequences: torch.Tensor) -> None:
        self.note("select", sequences.tolist())

    def clear(self) -> None:
        self.note("clear")


PLACES: dict[Placement, tuple[dict[str, Any], bool]] = {
    Placement.IN_PLACE: ({}, False),
    Placement.NEAR: ({"near": 1 << 20}, True),
    Placement.CODED: ({"quant": "int8"}, False),
    Placement.HOST: ({"near": 1 << 20}, False),
    Placement.DISK: ({}, False),
}


@pytest.fixture(params=Placement, ids=[p.name for p in Placement])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store in every placement, of two layers with records in them."""
    placement: Placement = request.param
    limits, lives_near = PLACES[placement]
    with DiskSpace(tmp_path, None) as space:
        disk = space if placement is Placement.DISK else None
        needs = Needs(2, lives_near=lives_near, evicts=placement is not Placement.DISK)
        store = Store([3, 5], StoreLimits(**limits, disk=disk), torch.device("cpu"), needs)
        assert store.placement is placement
        store.open_pages(LayerShape(B, HEADS, D, D, 4), torch.float32)
        for layer in (3, 5):
            store.append(layer, *torch.randn(2, B, HEADS, TOKENS, D).unbind(0))
        yield store


def test_followers_are_told_what_happens_to_their_layer(store: Store) -> None:
    told: list[Any] = []
    names = [("first", 3), ("second", 3), ("other", 5)]
    for name, layer in names:
        recorder = Recorder(name, store, layer, told)
        assert isinstance(recorder, Follower)
        store.follow(layer, recorder)

    def take() -> list[Any]:
        found = [entry[1:] for entry in told if entry[0] == "first"]
        assert [(n, *entry[1:]) for n in ("first", "second") for entry in told if entry[0] == "first"] == sorted(
            told, key=lambda entry: entry[0]
        ), "both are told the same, nobody else is told anything"
        assert [entry[0] for entry in told] == ["first", "second"] * len(found), "in the order in which they came"
        told.clear()
        return found

    store.append(3, *torch.randn(2, B, HEADS, 1, D).unbind(0))
    assert take() == [], "who follows sees new records when it looks"
    crop(store, 3, 4)
    # When it is told, the rows are gone.
    assert take() == [("crop", Cropped(TOKENS - 3, TOKENS - 3), TOKENS - 3)]
    length = TOKENS - 3
    if store.placement is not Placement.DISK:
        positions = torch.arange(5, length).expand(B, HEADS, -1)
        store.evict(3, Keep(positions, torch.zeros(positions.shape), length - 5))
        # When it is told, the rows are all there.
        assert take() == [("keep", positions.tolist(), length)]
        length -= 5
        crop(store, 3, 2)
        length -= 2
        assert take() == [("crop", Cropped(length, length + 5), length)]
        with pytest.raises(CacheStateError):
            crop(store, 3, length + 1)
        assert take() == [], "what is refused has not happened"
    store.select(3, torch.tensor([1, 0, 1]))
    assert take() == [("select", [1, 0, 1], length)]
    store.clear(3)
    assert take() == [("clear", 0)]


# --- what methods keep ------------------------------------------------------------------------------------------

# Enough for a fit that is final, so that nothing but the rows depends on what came and went.
PROMPTS = {"batch": make_prompt(2, tokens=80), "padded": make_prompt(2, tokens=80, pad=11)}
MORE = make_prompt(2, tokens=30, seed=9)["input_ids"]
SELECTORS: dict[str, Any] = {
    name: row.config() if row.config is Full else row.config(fraction=0.3)
    for name, row in METHODS.items()
    if row.selector is not None and row.config is not Random
}
EVICTORS: dict[str, Any] = {name: row.config(fraction=0.9) for name, row in METHODS.items() if row.evictor is not None}
EVERY = SELECTORS | EVICTORS
every_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
every_near = pytest.mark.parametrize("near", [None, "1MiB"])
every_prompt = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)


class Reader:
    """A cache that reads a prompt and then what it is given, with the mask of the prompt's padding."""

    def __init__(self, far: Any, prompt: dict[str, torch.Tensor]):
        self.model, self.cache, self.mask = far.model, far.new_cache(), prompt["attention_mask"]
        # What is fitted to the prompt is fitted to these tokens alone.
        self.cache.engine.announce_prompt(prompt["input_ids"].shape[1], 2048)
        self.read(prompt["input_ids"])

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read tokens in one pass; return their logits."""
        n = self.cache.get_seq_length() + ids.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, n - self.mask.shape[1]), value=1)
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True).logits

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Read tokens one by one; return all logits."""
        return torch.cat([self.read(one) for one in ids.split(1, 1)], 1)

    def select(self, order: torch.Tensor) -> None:
        """Keep these sequences."""
        self.cache.batch_select_indices(order)
        self.mask = self.mask[order]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Assert that logits are the same but for the order of sums."""
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@every_near
@every_prompt
@every_method
@pytest.mark.parametrize("passes", [[1, 1, 1], [7]], ids=["steps", "pass"])
def test_a_cropped_cache_is_one_that_never_had_those_tokens(
    method: Any, prompt: Any, near: Any, passes: list[int]
) -> None:
    with farkv.attach(model_for(method), method, near=near) as far:
        cropped, fresh = Reader(far, prompt), Reader(far, prompt)
        for each in (cropped, fresh):
            each.decode(MORE[:, :2])
        evicted = dict(fresh.cache.engine.store.evicted)
        # A pass of several tokens is another prompt, after which a method that evicts does so.
        detour = [1, 1, 1] if evicts(method) else passes
        for part in MORE[:, 5 : 5 + sum(detour)].split(detour, 1):
            cropped.read(part)
        assert cropped.cache.engine.store.evicted == evicted, "what was evicted cannot be taken back"
        cropped.cache.crop(-sum(detour))
        assert cropped.cache.get_seq_length() == fresh.cache.get_seq_length()
        assert_close(cropped.decode(MORE[:, 2:20]), fresh.decode(MORE[:, 2:20]))


@every_near
@every_prompt
@pytest.mark.parametrize("method", SELECTORS.values(), ids=SELECTORS)
def test_a_pass_that_is_taken_back_in_part_is_a_shorter_pass(method: Any, prompt: Any, near: Any) -> None:
    # Longer than the window: of the rows that it left out, older ones must not take the place.
    with farkv.attach(model_for(method), method, near=near) as far:
        cropped, fresh = Reader(far, prompt), Reader(far, prompt)
        cropped.read(MORE[:, :20])
        fresh.read(MORE[:, :5])
        cropped.cache.crop(-15)
        assert_close(cropped.decode(MORE[:, 20:26]), fresh.decode(MORE[:, 20:26]))


@every_near
@every_prompt
@every_method
def test_a_reordered_cache_is_one_of_that_order(method: Any, prompt: Any, near: Any) -> None:
    # Layers of one batch share what they may keep: of that the same sequences must be there.
    order = torch.tensor([1, 0] if evicts(method) else [1, 0, 1])
    with farkv.attach(model_for(method), method, near=near) as far:
        reordered, fresh = Reader(far, prompt), Reader(far, {name: rows[order] for name, rows in prompt.items()})
        reordered.decode(MORE[:, :2])
        reordered.select(order)
        fresh.decode(MORE[order, :2])
        assert_close(reordered.decode(MORE[order, 2:20]), fresh.decode(MORE[order, 2:20]))


def forget_rows(cache: Any) -> None:
    """Free what a selector keeps per row, so that it must be made anew of the stored keys."""
    for follower in cache.engine.selector.followers.values():
        (follower.index.rows if isinstance(follower, LayerFit) else follower).clear()


@every_near
@every_prompt
@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in ("full", "indexer")])
def test_what_is_kept_per_row_is_what_is_made_anew_of_the_rows_that_an_eviction_leaves(
    name: str, prompt: Any, near: Any
) -> None:
    with farkv.attach(make_model("llama"), SELECTORS[name], XKV(fraction=0.5), near=near) as far:
        kept, anew = Reader(far, prompt), Reader(far, prompt)
        for each in (kept, anew):
            each.decode(MORE[:, :3])
        assert all(kept.cache.engine.store.evicted.values())
        forget_rows(anew.cache)
        assert_close(kept.decode(MORE[:, 3:9]), anew.decode(MORE[:, 3:9]))
