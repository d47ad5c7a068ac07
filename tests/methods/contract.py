"""What every method promises, as checks of a config: `CASES` has each check with the places it is made in.

A test of a method from outside parametrises the same cases with its own config, which has a row in the table:

    @pytest.mark.parametrize(("check", "near"), CASES)
    def test_it_keeps_the_contract(check, near):
        check((MyMethod(fraction=0.3),), near)
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farkv
from farkv.config import SOURCES
from farkv.engine.records import LayerRecords
from farkv.errors import CacheStateError, CapacityError
from farkv.methods.base import Evictor, Records, Selector
from farkv.methods.random import Random
from farkv.methods.table import evicts, find_name, find_row
from tests.hf.tape import Tape
from tests.models import assert_same, forward, generate, make_prompt, model_for, plain_cache

Methods = tuple[Any, ...]
Check = Callable[[Methods, str | None], None]
IDS = make_prompt(2, tokens=60)["input_ids"]
# Every sequence keeps enough of so many tokens that something is left to choose from, and something to evict.
TOKENS = IDS.shape[1]
CASES: list[Any] = []


def everywhere(check: Check) -> Check:
    """Make a check with records in place, and with near memory as a tier of its own."""
    CASES.extend(pytest.param(check, near, id=f"{check.__name__}-{near}") for near in (None, "1MiB"))
    return check


def in_place(check: Check) -> Check:
    """Make a check with records in place alone: near memory has no part in it."""
    CASES.append(pytest.param(check, None, id=check.__name__))
    return check


def steps(model: Any, cache: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Decode these tokens one by one."""
    return [forward(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Say whether all are bit-equal."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def keeps_all(methods: Methods) -> bool:
    """Say whether no record is ever evicted."""
    return not any(evicts(method) for method in methods)


def repeats(methods: Methods) -> bool:
    """Say whether the same tokens are answered alike again by one cache: not where each step draws anew."""
    return not any(isinstance(method, Random) for method in methods)


def count_scores(store: Any) -> int:
    """Return the bytes of evictable records' places and scores."""
    return sum(kept.places.n_bytes + kept.scores.n_bytes for kept in store.kept.values())


# --- what it is -------------------------------------------------------------------------------------------------


@in_place
def is_one_row_of_the_table(methods: Methods, near: str | None) -> None:
    for method in methods:
        row = find_row(method)
        assert dataclasses.is_dataclass(method)
        assert type(method).__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert find_name(method).isidentifier()
        assert (row.selector is None) != (row.evictor is None), "a method selects or evicts"
        assert row.selector is None or issubclass(row.selector, Selector)
        assert row.evictor is None or issubclass(row.evictor, Evictor)
    model = model_for(*methods)
    with farkv.attach(model, *methods) as far:
        cache = far.new_cache()
        forward(model, IDS[:, :3], cache)
        engine, method = cache.engine, far.method
        assert engine.selector.source in (None, *SOURCES)
        assert not engine.mode.dense
        assert not engine.mode.measures
        for layer, records in engine.records.items():
            assert isinstance(records, LayerRecords)
            assert isinstance(records, Records)
            for part in (engine.selector, engine.parts.evictor):
                follower = None if part is None else part.followers.get(layer)
                assert follower is None or follower in engine.store.following(layer)
        assert far.receipt().method.startswith(find_name(method))
    assert model.config._attn_implementation == "sdpa"


@in_place
def leaves_the_model_as_it_was(methods: Methods, near: str | None) -> None:
    model, prompt = model_for(*methods), make_prompt(1, tokens=30)
    plain = generate(model, prompt)
    hooks = count_hooks(model)
    with farkv.attach(model, *methods) as far:
        generate(model, prompt, far.new_cache())
        assert count_hooks(model) > hooks
        # An ordinary cache behaves as ever meanwhile.
        assert_same(generate(model, prompt, plain_cache(model)), plain)
    assert count_hooks(model) == hooks
    assert_same(generate(model, prompt), plain)


def count_hooks(model: Any) -> int:
    """Return how many hooks there are on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what it reads ----------------------------------------------------------------------------------------------


@everywhere
def equals_the_plain_model_at_a_whole_budget(methods: Methods, near: str | None) -> None:
    model, prompt = model_for(*methods), make_prompt(3, pad=9)
    others = {"tokens": None, "retention": None}
    whole = [
        dataclasses.replace(m, fraction=1.0, **{k: v for k, v in others.items() if hasattr(m, k)}) for m in methods
    ]
    plain = generate(model, prompt)
    with farkv.attach(model, *whole, near=near) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)


@everywhere
def keeps_its_cap_its_bytes_and_its_lengths(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache(tokens=70, batch=2)
        with Tape(model, cache) as tape:
            forward(model, IDS, cache)
            steps(model, cache, IDS[:, :5])
        receipt = far.receipt()
    assert {layer.get_seq_length() for layer in cache.layers} == {65}
    assert receipt.context_tokens == 65
    store, selector, evictor = cache.engine.store, cache.engine.selector, cache.engine.parts.evictor
    # What never evicts while it decodes has its cap of the prompt alone.
    grown = 5 / 65 if evictor is not None and evictor.rule.grows else 0.0
    for method in methods:
        assert method.fraction is None or receipt.read_fraction <= method.fraction + grown + 1e-9
    metadata = sum(each.size.metadata_bytes for each in store.recently_used.values()) + count_scores(store)
    index = store.index.used if store.home is store.near or store.shares_host else 0
    assert store.home.used == sum(rows.n_bytes for rows in store.pool.values()) + metadata + index
    most = sum(selector.index_bytes(store.shape(i), 70) for i in store.order if not selector.reads_all(i))
    assert store.index.peak <= most, "an index is no larger than it says"
    assert len(tape.decode()) == 5
    for p in tape.decode():
        for positions, valid in p.reads.values():
            assert (positions[..., -1:] == positions.amax(-1, True)).all(), "the newest is read"
            keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            for row, flags in zip(positions.flatten(0, 1), keep.flatten(0, 1), strict=True):
                chosen = row[flags].tolist()
                assert len(chosen) == len(set(chosen))


@everywhere
def keeps_keys_and_values_unchanged(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    plain = model(input_ids=IDS).past_key_values
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    store = cache.engine.store
    assert keeps_all(methods) != any(store.evicted.values())
    for i in range(4):
        data = store.pool[i].view()
        rows = torch.arange(data.shape[2]).expand(*data.shape[:2], -1)
        at = store.locate(i, rows)[..., None].expand(-1, -1, -1, 8)
        assert keeps_all(methods) == (data.shape[2] == TOKENS)
        assert torch.equal(data[..., :8], plain.layers[i].keys.gather(2, at))
        assert torch.equal(data[..., 8:], plain.layers[i].values.gather(2, at))


@in_place
def works_in_the_near_memory_that_it_says_it_needs(methods: Methods, near: str | None) -> None:
    model, limit, asked = model_for(*methods), 1, 0
    while True:
        assert asked < 5, "what an error asks for is enough, or nearly"
        with farkv.attach(model, *methods, near=limit) as far:
            try:
                cache = far.new_cache(tokens=TOKENS + 6, batch=2)
            except CapacityError as error:
                found = re.search(r"raise --near to at least (\d+)", str(error))
                assert found is not None
                assert int(found[1]) > limit
                limit, asked = int(found[1]), asked + 1
                continue
            forward(model, IDS, cache)
            steps(model, cache, IDS[:, :6])
            assert asked
            assert 0 < cache.engine.store.near.peak <= limit
            return


@in_place
def survives_prompts_of_few_tokens(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    for n in (1, 2, 3):
        with farkv.attach(model, *methods) as far:
            out = generate(model, make_prompt(2, tokens=n), far.new_cache(), n=8)
        assert all(logits.isfinite().all() for logits in out.logits)


@everywhere
def does_the_same_again(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods, near=near) as far:
        runs = [generate(model, make_prompt(2, tokens=40, pad=9), far.new_cache()) for _ in range(2)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert same(list(runs[0].logits), list(runs[1].logits))


# --- the cache's state ------------------------------------------------------------------------------------------


@everywhere
def is_copied_without_meeting_its_copy(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        steps(model, cache, IDS[:, :2])
        twin = copy.deepcopy(cache)
        expected = steps(model, cache, IDS[:, 2:5])
        assert cache.get_seq_length() == 65
        assert twin.get_seq_length() == 62
        assert same(steps(model, twin, IDS[:, 2:5]), expected)


@everywhere
def takes_tokens_back(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        evicted = dict(cache.engine.store.evicted)
        expected = steps(model, cache, IDS[:, :3])
        # As far as nothing was evicted on the way, tokens can be taken back; no further.
        if cache.engine.store.evicted == evicted:
            cache.crop(-3)
            assert cache.get_seq_length() == TOKENS
            again = steps(model, cache, IDS[:, :3])
            assert not repeats(methods) or same(again, expected)
        if not keeps_all(methods):
            with pytest.raises(CacheStateError, match="was evicted"):
                cache.crop(-50)
            assert cache.get_seq_length() == TOKENS + 3


@everywhere
def frees_everything_when_it_is_reset(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        first = steps(model, cache, IDS[:, :2])
        cache.reset()
        store = cache.engine.store
        assert store.host.used == store.near.used == store.index.used == 0
        forward(model, IDS, cache)
        again = steps(model, cache, IDS[:, :2])
    assert not repeats(methods) or same(again, first)


@in_place
def holds_no_model(methods: Methods, near: str | None) -> None:
    model = model_for(*methods)
    with farkv.attach(model, *methods) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    memo: dict[int, Any] = {}
    copy.deepcopy(cache, memo)
    assert not [v for v in memo.values() if isinstance(v, torch.nn.Module)]
