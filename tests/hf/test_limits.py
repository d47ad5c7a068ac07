"""Promise 2: no byte limit is ever passed, and what cannot fit is refused before anything is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.engine import bytes_recent
from farkv.errors import CapacityError
from farkv.methods import Full, InfiniGen, LowBit, Method, Oracle, Pages, Random, Window
from tests.models import generate, make_model, make_prompt

TOKENS, NEW, LAYERS = 48, 4, 2
PROMPT = make_prompt(1, tokens=TOKENS)
# K and V of one token in all layers: 1 head of 8, float32.
TOKEN = LAYERS * 1 * 2 * 8 * 4
WHOLE = (TOKENS + NEW) * TOKEN
METHODS: dict[str, Method] = {
    "ours": InfiniGen(fraction=0.3),
    "paper": InfiniGen(fraction=0.7, paper=True),
    "full": Full(),
    "window": Window(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "pages": Pages(fraction=0.3, page=8),
    "lowbit": LowBit(fraction=0.3),
}


def tiny() -> Any:
    """Hundreds of runs: the smallest model that has everything."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    return make_model("llama", num_hidden_layers=LAYERS, **shape)


def count_storages(tensors: list[Any]) -> int:
    """Return the bytes that tensors really hold, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def index_tensors(engine: Any) -> list[Any]:
    """Return what the method keeps of every layer besides its records."""
    return [getattr(each, "index", each).rows.data for each in engine.selector.followers.values()]


def near_tensors(engine: Any) -> list[Any]:
    """Return every long-lived near tensor by its place in the objects, not by the ledgers."""
    store = engine.store
    found = [window.data for window in store.windows.values()] + list(store.buffers._areas)
    found += [each.rows.data for each in store.recently_used.values()]
    return found + index_tensors(engine)


def watch(model: Any, cache: Any, limits: dict[str, int]) -> Any:
    """After every pass: what is allocated is what the ledgers say, and within the limit."""

    def after(*_: object) -> None:
        store = cache.engine.store
        near = count_storages(near_tensors(cache.engine))
        metadata = [t for each in store.recently_used.values() for t in each.metadata]
        pool = count_storages([rows.data for rows in store.pool.values()] + metadata)
        assert near == store.near.used <= limits.get("near", near)
        # Where near memory is no tier of its own, it is the host's.
        host = pool + (near if store.shares_host else 0)
        assert host == store.host.used <= limits.get("host", host)

    return model.register_forward_hook(after)


def run(method: Method, limits: dict[str, int], *, reserve: bool) -> bool:
    """Generate under limits; return whether it was done, having checked what must hold either way."""
    model = tiny()
    done = True
    with farkv.attach(model, method, **limits) as far:
        try:
            cache = far.new_cache(tokens=TOKENS + NEW if reserve else 0)
        except CapacityError as error:
            assert reserve, error
            return False
        hook = watch(model, cache, limits)
        try:
            generate(model, PROMPT, cache, n=NEW)
        except CapacityError as error:
            done = False
            lengths = {cache.engine.store.length(i) for i in range(LAYERS)}
            assert len(lengths) == 1, f"half a token was stored: {lengths}"
            assert "raise --" in str(error)
            if reserve:
                assert lengths == {0}, f"refused only after the prompt was read: {error}"
        finally:
            hook.remove()
        size = far.receipt(cache).kv_bytes
        assert size.near_peak <= limits.get("near", size.near_peak)
        assert size.host_peak <= limits.get("host", size.host_peak)
    return done


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_near_limits(method: str, reserve: bool) -> None:
    steps = range(1, 33) if method == "ours" else range(2, 33, 5)
    done = [run(METHODS[method], {"near": WHOLE * step // 16}, reserve=reserve) for step in steps]
    assert not done[0]
    assert done[-1]
    assert done == sorted(done), "a larger limit never refuses what a smaller one took"


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("method", ["ours", "paper", "pages"])
def test_near_limits_just_at_the_edge(method: str, reserve: bool) -> None:
    low, high = WHOLE // 4, 4 * WHOLE
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (low, middle) if run(METHODS[method], {"near": middle}, reserve=reserve) else (middle, high)
    done = [run(METHODS[method], {"near": high + step * 97}, reserve=reserve) for step in range(6)]
    assert all(done)


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("method", ["ours", "full"])
def test_host_limits(method: str, reserve: bool) -> None:
    steps = range(10, 42) if method == "ours" else range(10, 42, 5)
    done = [run(METHODS[method], {"host": WHOLE * step // 20}, reserve=reserve) for step in steps]
    assert not done[0]
    assert done[-1]
    assert done == sorted(done)


def test_both_limits_at_once() -> None:
    assert run(METHODS["ours"], {"near": 2 * WHOLE, "host": 2 * WHOLE}, reserve=True)
    assert not run(METHODS["ours"], {"near": WHOLE, "host": WHOLE // 2}, reserve=True)


def test_a_limit_changes_no_answer() -> None:
    model = tiny()
    answers = []
    # (Without a near limit records are read in place, and chosen by the true query.)
    for near in (2 * WHOLE, 4 * WHOLE, 8 * WHOLE):
        with farkv.attach(model, METHODS["ours"], near=near) as far:
            answers.append(generate(model, PROMPT, far.new_cache(), n=NEW))
    for other in answers[1:]:
        assert torch.equal(other.sequences, answers[0].sequences)
        for a, b in zip(other.logits, answers[0].logits, strict=True):
            # The same records through another kernel shape at most: float32 sums in another order.
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("method", [METHODS["ours"], METHODS["paper"], Random(fraction=0.3)])
def test_a_recently_used_set_changes_no_bit(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = tiny(), []
    padded = make_prompt(2, tokens=TOKENS, pad=9)
    for least, share in ((10**9, 32), (1, 32), (1, 64)):
        monkeypatch.setattr(bytes_recent, "LEAST_SLOTS", least)
        with farkv.attach(model, method, near=2 * WHOLE * share // 16) as far:
            cache = far.new_cache()
            answer = generate(model, padded, cache, n=8)
            slots = [each.size.slots for each in cache.engine.store.recently_used.values()]
            runs.append((answer, slots, far.receipt(cache).fetched_bytes_per_token))
    (without, none, all_bytes), *others = runs
    assert none == []
    for answer, slots, n_bytes in others:
        assert min(slots) > 0
        assert n_bytes < all_bytes
        assert torch.equal(answer.sequences, without.sequences)
        for a, b in zip(answer.logits, without.logits, strict=True):
            assert torch.equal(a, b)


def test_a_cache_goes_on_after_a_refusal() -> None:
    model = tiny()
    with farkv.attach(model, InfiniGen(fraction=1.0), host=WHOLE * 3) as far:
        cache = far.new_cache(tokens=TOKENS + NEW)
        first = generate(model, PROMPT, cache, n=2)
        length = cache.get_seq_length()
        long = torch.randint(1, 97, (1, 500))
        with pytest.raises(CapacityError, match="host limit"):
            model(input_ids=long, past_key_values=cache)
        assert cache.get_seq_length() == length
        ids = first.sequences
        again = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, n=2)
    plain = generate(model, PROMPT, n=4)
    assert torch.equal(again.sequences, plain.sequences)


def test_several_sequences_can_be_reserved() -> None:
    model = tiny()
    with farkv.attach(model, METHODS["ours"], host=2 * WHOLE) as far:
        far.new_cache(tokens=TOKENS + NEW)
        with pytest.raises(CapacityError, match="host limit"):
            far.new_cache(tokens=TOKENS + NEW, batch=3)
