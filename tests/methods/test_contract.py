"""One suite that every method passes: it is a Recipe, it keeps its cap, its books and its cache's state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.methods import (
    H2O,
    XKV,
    Full,
    InfiniGen,
    LowBit,
    Method,
    Oracle,
    Pages,
    PyramidKV,
    Random,
    SnapKV,
    Window,
    make_recipe,
)
from farkv.methods.contract import Place, Recipe
from farkv.receipt import Account
from farkv.store.tiers import StoreLimits
from tests.hf.tape import Tape
from tests.models import forward, generate, make_model, make_prompt

METHODS: dict[str, Method] = {
    "full": Full(),
    "ours": InfiniGen(fraction=0.3),
    "paper": InfiniGen(fraction=0.45, paper=True),
    "alpha": InfiniGen(fraction=0.3, alpha=2.0),
    "top_p": InfiniGen(fraction=0.3, top_p=0.5),
    "attn": InfiniGen(fraction=0.3, source="attn"),
    "residual": InfiniGen(fraction=0.3, source="residual"),
    "no_top_up": InfiniGen(fraction=0.3, top_up=0.0, sinks=0, window=0),
    "window": Window(fraction=0.3),
    "random": Random(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "pages": Pages(fraction=0.3, page=8),
    "lowbit": LowBit(fraction=0.3),
    "lowbit_4": LowBit(fraction=0.3, bits=4),
}
NEARS = [None, "1MiB"]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_near = pytest.mark.parametrize("near", NEARS)
IDS = make_prompt(2, tokens=60)["input_ids"]


def steps(model: Any, cache: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    return [forward(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_method
def test_it_is_a_recipe(method: Method) -> None:
    account = Account()
    recipe = make_recipe(method, Place([0, 2, 3], StoreLimits(), torch.device("cpu"), account), None)
    assert isinstance(recipe, Recipe)
    assert recipe.account is account
    assert recipe.query_source in (None, "attn", "residual", "post_attn")
    assert not recipe.dense
    assert not recipe.measuring


@every_near
@every_method
def test_it_keeps_cap_books_and_lengths(method: Method, near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache(tokens=70, batch=2)
        with Tape(model, cache) as tape:
            forward(model, IDS, cache)
            steps(model, cache, IDS[:, :5])
        receipt = far.receipt()
    assert {layer.get_seq_length() for layer in cache.layers} == {65}
    assert receipt.context_tokens == 65
    assert receipt.read_fraction <= method.fraction + 1e-9  # type: ignore[operator]
    store = cache.engine.store
    books = sum(hot.size.metadata_bytes for hot in store.recently_used.values())
    assert store.host.used == sum(rows.n_bytes for rows in store.pool.values()) + books
    for p in tape.decode():
        for positions, valid in p.reads.values():
            assert (positions[..., -1:] == positions.amax(-1, True)).all(), "the newest is read"
            keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            for row, flags in zip(positions.flatten(0, 1), keep.flatten(0, 1), strict=True):
                chosen = row[flags].tolist()
                assert len(chosen) == len(set(chosen))


@every_method
def test_keys_and_values_are_stored_unchanged(method: Method) -> None:
    model = make_model("llama")
    plain = model(input_ids=IDS).past_key_values
    with farkv.attach(model, method) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    for i in range(4):
        rows = cache.engine.store.pool[i].view()
        assert torch.equal(rows[..., :8], plain.layers[i].keys)
        assert torch.equal(rows[..., 8:], plain.layers[i].values)


@every_near
@every_method
def test_the_same_run_twice_is_the_same(method: Method, near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        runs = [generate(model, make_prompt(2, tokens=40, pad=9), far.new_cache()) for _ in range(2)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert same(list(runs[0].logits), list(runs[1].logits))


@every_near
@every_method
def test_copies_do_not_meet(method: Method, near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        steps(model, cache, IDS[:, :2])
        twin = copy.deepcopy(cache)
        expected = steps(model, cache, IDS[:, 2:5])
        assert cache.get_seq_length() == 65
        assert twin.get_seq_length() == 62
        assert same(steps(model, twin, IDS[:, 2:5]), expected)


@every_method
def test_a_crop_takes_tokens_back(method: Method) -> None:
    model = make_model("llama")
    with farkv.attach(model, method) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        expected = steps(model, cache, IDS[:, :3])
        cache.crop(-3)
        assert cache.get_seq_length() == 60
        again = steps(model, cache, IDS[:, :3])
    if not isinstance(method, Random):
        assert same(again, expected)


@every_near
@every_method
def test_reset_frees_everything(method: Method, near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        first = steps(model, cache, IDS[:, :2])
        cache.reset()
        store = cache.engine.store
        assert store.host.used == store.near.used == store.index.used == 0
        forward(model, IDS, cache)
        again = steps(model, cache, IDS[:, :2])
    if not isinstance(method, Random):
        assert same(again, first)


@every_method
def test_it_survives_prompts_of_one_and_two_tokens(method: Method) -> None:
    model = make_model("llama")
    for n in (1, 2, 3):
        with farkv.attach(model, method) as far:
            out = generate(model, make_prompt(2, tokens=n), far.new_cache(), n=8)
        assert all(logits.isfinite().all() for logits in out.logits)


@every_method
def test_a_cache_holds_no_model(method: Method) -> None:
    model = make_model("llama")
    with farkv.attach(model, method) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    memo: dict[int, Any] = {}
    copy.deepcopy(cache, memo)
    assert not [v for v in memo.values() if isinstance(v, torch.nn.Module)]


# --- methods that evict -----------------------------------------------------------------------------------------

EVICTING: dict[str, tuple[Method, ...]] = {
    "xkv": (XKV(fraction=0.3),),
    "xkv_tokens": (XKV(tokens=60),),
    "xkv_retention": (XKV(retention=0.6),),
    "xkv_paper": (XKV(fraction=0.3, paper=True),),
    "infinigen+keep": (InfiniGen(fraction=0.2), XKV(fraction=0.5)),
    "h2o": (H2O(fraction=0.3),),
    "snapkv": (SnapKV(fraction=0.3),),
    "pyramidkv": (PyramidKV(fraction=0.3),),
}
ALONE = {name: methods[0] for name, methods in EVICTING.items() if len(methods) == 1}
every_single_evicting = pytest.mark.parametrize("method", ALONE.values(), ids=ALONE)
every_evicting = pytest.mark.parametrize("methods", EVICTING.values(), ids=EVICTING)


@every_near
@every_evicting
def test_what_is_kept_is_stored_unchanged_and_in_the_books(methods: tuple[Method, ...], near: Any) -> None:
    # The other methods' claim for all rows holds here for those that stay, at their places.
    model = make_model("llama")
    plain = model(input_ids=IDS).past_key_values
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
    store = cache.engine.store
    assert isinstance(cache.engine, Recipe)
    assert all(store.evicted.values())
    for i in range(4):
        data = store.pool[i].view()
        rows = torch.arange(data.shape[2]).expand(*data.shape[:2], -1)
        at = store.locate(i, rows)[..., None].expand(-1, -1, -1, 8)
        assert torch.equal(data[..., :8], plain.layers[i].keys.gather(2, at))
        assert torch.equal(data[..., 8:], plain.layers[i].values.gather(2, at))
    books = sum(kept.places.n_bytes + kept.marks.n_bytes for kept in store.kept.values())
    index = store.index.used if store.home is store.near else 0
    assert store.home.used == sum(rows.n_bytes for rows in store.pool.values()) + books + index


@every_near
@every_evicting
def test_an_evicted_cache_is_copied_cropped_and_reset_as_others_are(methods: tuple[Method, ...], near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        evicted = dict(cache.engine.store.evicted)
        twin = copy.deepcopy(cache)
        expected = steps(model, cache, IDS[:, :3])
        assert same(steps(model, twin, IDS[:, :3]), expected)
        # As far as nothing was evicted on the way, tokens can be taken back; no further.
        if cache.engine.store.evicted == evicted:
            cache.crop(-3)
            assert cache.get_seq_length() == 60
            assert same(steps(model, cache, IDS[:, :3]), expected)
        with pytest.raises(CacheStateError, match="was evicted"):
            twin.crop(-50)
        assert twin.get_seq_length() == 63
        memo: dict[int, Any] = {}
        copy.deepcopy(cache, memo)
        assert not [v for v in memo.values() if isinstance(v, torch.nn.Module)]
        cache.reset()
        store = cache.engine.store
        assert store.host.used == store.near.used == store.index.used == 0
        forward(model, IDS, cache)
        assert same(steps(model, cache, IDS[:, :3]), expected)


@every_single_evicting
def test_an_evicting_method_is_a_recipe(method: Method) -> None:
    account = Account()
    recipe = make_recipe(method, Place([0, 2, 3], StoreLimits(), torch.device("cpu"), account), None)
    assert isinstance(recipe, Recipe)
    assert recipe.account is account
    assert recipe.query_source is None
    assert not recipe.dense


@every_single_evicting
def test_an_evicting_method_survives_prompts_of_few_tokens(method: Method) -> None:
    model = make_model("llama")
    for n in (1, 2, 3):
        with farkv.attach(model, method) as far:
            out = generate(model, make_prompt(2, tokens=n), far.new_cache(), n=8)
        assert all(logits.isfinite().all() for logits in out.logits)


@every_near
@every_single_evicting
def test_an_evicting_run_twice_is_the_same(method: Method, near: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, near=near) as far:
        runs = [generate(model, make_prompt(2, tokens=40, pad=9), far.new_cache()) for _ in range(2)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert same(list(runs[0].logits), list(runs[1].logits))
