"""Pages: what is chosen is what Quest's bound, computed a second time in float64, says; and its bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.math.bounds import bound_pages
from farkv.methods import XKV, Pages
from farkv.store.sizes import count_cap
from tests.methods.replay_choice import Choice, divide, pool, record
from tests.models import forward, make_model, make_prompt

PAGE, FRACTION = 8, 0.3
METHOD = Pages(fraction=FRACTION, page=PAGE)
IDS = make_prompt(2, tokens=60)["input_ids"]


def choose_plainly(seen: Choice) -> set[int]:
    """Take the pages with the largest bounds until the cap is full."""
    n, real = seen.keys.shape[0], seen.real
    cap = count_cap(FRACTION, len(real))
    taken, scored = divide(real, cap)
    bounds = []
    for start in range(0, n, PAGE):
        # Of a page that reaches into the window all keys count, but for the newest: it joins its page after the step.
        rows = [t for t in real if start <= t < start + PAGE and t < n - 1]
        if not any(start <= t < start + PAGE for t in scored):
            bounds.append(torch.full((len(seen.q),), -torch.inf, dtype=torch.float64))
            continue
        low, high = seen.keys[rows].amin(0), seen.keys[rows].amax(0)
        bounds.append(torch.maximum(seen.q * low, seen.q * high).sum(-1) * seen.scaling)
        logits = seen.q @ seen.keys[rows].T * seen.scaling
        assert (bounds[-1][:, None] >= logits - 1e-9).all(), "an upper bound"
    worth = pool(torch.stack(bounds, -1))
    for p in worth.argsort(descending=True).tolist():
        for t in range(p * PAGE, min(n, p * PAGE + PAGE)):
            if t in scored and len(taken) < cap:
                taken.add(t)
    assert len(taken) == cap
    return taken


@pytest.mark.parametrize(("pad", "chunk", "near"), [(0, None, None), (0, 7, "1MiB"), (19, 7, None), (19, None, "1MiB")])
def test_the_pages_with_the_largest_bounds_are_read(pad: int, chunk: int | None, near: str | None) -> None:
    chunked = {} if chunk is None else {"prefill_chunk_size": chunk}
    found = record(make_model("llama"), METHOD, make_prompt(2, tokens=77, pad=pad), near, **chunked)
    for seen in found:
        assert seen.read == choose_plainly(seen), seen.where


def test_what_is_counted() -> None:
    model = make_model("llama")
    with farkv.attach(model, METHOD) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        forward(model, IDS[:, :1], cache)
        receipt = far.receipt()
    engine = cache.engine
    # 61 tokens: the cap is 18, its window 2 and the newest are no candidates; 58 tokens stand on 8 pages.
    assert receipt.read_fraction == pytest.approx(18 / 61)
    assert receipt.index_fraction == pytest.approx(8 * 2 * 8 / (61 * 2 * 8))
    assert engine.store.index.used == sum(bounds.rows.n_bytes for bounds in engine.selector.bounds.values())
    assert receipt.kv_bytes.index_peak >= 4 * 2 * 2 * 8 * 2 * 8 * 4
    assert all(bounds.rows.dtype == torch.float32 for bounds in engine.selector.bounds.values())


def check_bounds(cache: Any) -> None:
    """The bounds are those of what is stored, all but the newest."""
    engine = cache.engine
    for i, bounds in engine.selector.bounds.items():
        keys = engine.store.keys(i, 0, bounds.length)
        assert engine.store.length(i) - 1 <= bounds.length <= engine.store.length(i)
        visible = engine.records[i].visible(bounds.length)
        assert torch.equal(bounds.view(bounds.length), bound_pages(keys, visible, PAGE))


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_bounds_follow_crops_beams_and_copies(near: str | None) -> None:
    model = make_model("llama")
    with farkv.attach(model, METHOD, near=near) as far:
        cache = far.new_cache()
        for piece in (IDS[:, :20], IDS[:, 20:33], *IDS[:, 33:37].split(1, 1)):
            forward(model, piece, cache)
            check_bounds(cache)
        cache.crop(-3)
        twin = copy.deepcopy(cache)
        forward(model, IDS[:, 34:35], cache)
        check_bounds(cache)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        forward(model, IDS[:1, :1].expand(3, 1), cache)
        check_bounds(cache)
        forward(model, IDS[:, 34:35], twin)
        check_bounds(twin)


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_bounds_are_made_anew_of_what_an_eviction_leaves(near: str | None) -> None:
    model = make_model("llama")
    with farkv.attach(model, METHOD, XKV(fraction=0.6), near=near) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        assert all(cache.engine.store.evicted.values())
        forward(model, IDS[:, :1], cache)
        check_bounds(cache)
        assert far.receipt().read_fraction <= FRACTION + 1e-9


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_bounds_of_coded_records_hold_for_what_is_read(quant: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, METHOD, quant=quant) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        for t in range(3):
            forward(model, IDS[:, t : t + 1], cache)
    engine = cache.engine
    for i, bounds in engine.selector.bounds.items():
        # Coded keys are read back when they are scored: the newest one at the next step.
        assert bounds.length == engine.store.length(i) - 1
        keys = engine.store.keys(i, 0, bounds.length)
        assert torch.equal(bounds.view(bounds.length), bound_pages(keys, None, PAGE))


def test_joined_batches_choose_from_pages_of_their_own_records() -> None:
    model = make_model("llama")
    with farkv.attach(model, METHOD) as far:
        cache, other = far.new_cache(), far.new_cache()
        forward(model, IDS[:1], cache)
        forward(model, IDS[1:, :41], other)
        cache.join(other)
        mask = torch.ones(2, 61, dtype=torch.long)
        mask[1, :19] = 0
        model(input_ids=IDS[:, :1], attention_mask=mask, past_key_values=cache)
        check_bounds(cache)
