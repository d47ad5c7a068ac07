"""Several caches of one handle: together they stay within its limits, and answer as each would alone."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CapacityError
from farkv.methods import Full, InfiniGen, Method, Pages, SnapKV
from tests.models import forward, make_model, make_prompt

IDS = make_prompt(1, tokens=64)["input_ids"]
# K and V of one token: 4 layers, 2 heads of 8, float32.
TOKEN = 4 * 2 * 2 * 8 * 4


def read(model: Any, far: Any, tokens: int = 0) -> Any:
    cache = far.new_cache(tokens=tokens)
    forward(model, IDS, cache)
    return cache


def decode(model: Any, cache: Any, n: int = 4) -> torch.Tensor:
    return torch.stack([forward(model, IDS[:, i : i + 1], cache) for i in range(n)])


@pytest.mark.parametrize("method", [Full(), InfiniGen(fraction=0.3)])
@pytest.mark.parametrize("gone", ["reset", "dropped"])
def test_a_second_cache_is_refused_in_words_and_fits_when_the_first_is_gone(method: Method, gone: str) -> None:
    model = make_model("llama")
    with farkv.attach(model, method, host=190 * TOKEN) as far:
        one = read(model, far, 100)
        with pytest.raises(CapacityError, match=r"host limit: .* other caches of this model hold [\d,]+ .*reset"):
            far.new_cache(tokens=110)
        decode(model, one)
        if gone == "reset":
            one.reset()
        one = None
        read(model, far, 110)


@pytest.mark.parametrize("tier", ["host", "near"])
def test_what_an_evictor_evicts_others_may_have(tier: str) -> None:
    model = make_model("llama")
    with farkv.attach(model, SnapKV(fraction=0.3), **{tier: 320 * TOKEN}) as far:
        caches = []
        for _ in range(4):
            caches.append(read(model, far))
            decode(model, caches[-1])
        assert getattr(far.setting.limits.shared, tier).peak <= 320 * TOKEN


def test_a_promise_is_kept_to_the_cache_that_it_was_made_to() -> None:
    model = make_model("llama")
    with farkv.attach(model, Full(), host=180 * TOKEN) as far:
        announced = far.new_cache(tokens=100)
        other = read(model, far)
        with pytest.raises(CapacityError, match="other caches"):
            forward(model, IDS, other)
        forward(model, IDS, announced)
        decode(model, announced, 30)
        assert announced.get_seq_length() == 94


@pytest.mark.parametrize("options", [{"host": 500}, {"host": 500, "near": 180}, {"host": 500, "quant": "int8"}])
def test_copies_are_counted_or_refused(options: dict[str, Any]) -> None:
    model = make_model("llama")
    limits = {name: n * TOKEN if isinstance(n, int) else n for name, n in options.items()}
    with farkv.attach(model, InfiniGen(fraction=0.3), **limits) as far:
        one, twins = read(model, far), []
        with pytest.raises(CapacityError, match=r"a copy of a cache .*other caches"):
            for _ in range(20):
                twins.append(copy.deepcopy(one))
        shared = far.setting.limits.shared
        assert shared is not None
        assert shared.host.used <= limits["host"]
        before = shared.host.used
        twins.clear()
        gc.collect()
        assert shared.host.used < before
        decode(model, one)


def test_page_copies_make_room_for_another_cache(tmp_path: Path) -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.5), host="640KiB", disk=str(tmp_path)) as far:
        caches = []
        for _ in range(3):
            caches.append(far.new_cache(tokens=400))
            for _ in range(6):
                forward(model, IDS, caches[-1])
        rooms = [cache.engine.store.page_cache.room for cache in caches]
        assert all(rooms)
        answers = [decode(model, cache) for cache in caches]
        assert far.setting.limits.shared.host.peak <= 640 * 1024
    with farkv.attach(model, InfiniGen(fraction=0.5), host="640KiB", disk=str(tmp_path)) as far:
        alone = far.new_cache(tokens=400)
        for _ in range(6):
            forward(model, IDS, alone)
        assert alone.engine.store.page_cache.room >= max(rooms)
    assert answers[0].shape == answers[2].shape


def test_recently_used_sets_make_room_for_another_cache() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.2), near="96KiB") as far:
        one = read(model, far)
        decode(model, one)
        assert one.engine.store.recently_used, "the test needs them"
        near = far.setting.limits.shared.near
        other = read(model, far)
        decode(model, other)
        assert near.peak <= 96 * 1024
        decode(model, one)


def test_two_threads_with_a_cache_each_pass_no_limit_and_answer_as_alone() -> None:
    model = make_model("llama")
    with farkv.attach(model, Full()) as far:
        expected = decode(model, read(model, far))
    found: dict[int, torch.Tensor] = {}
    with farkv.attach(model, Full(), host=260 * TOKEN) as far:

        def play(i: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    found[i] = decode(model, read(model, far, 80))

        threads = [threading.Thread(target=play, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared = far.setting.limits.shared
        assert shared is not None
        assert shared.host.peak <= 260 * TOKEN
    for i in range(2):
        if i in found:
            assert torch.equal(found[i], expected)


def test_an_index_counts_where_its_records_do() -> None:
    model = make_model("llama")
    method = Pages(fraction=0.3, page=2)
    with farkv.attach(model, method, host=100 * TOKEN) as far, pytest.raises(CapacityError, match="host limit"):
        # One page's bounds take the bytes of one token's record.
        far.new_cache(tokens=70)
    with farkv.attach(model, method, host=200 * TOKEN) as far:
        cache = read(model, far, 70)
        assert cache.engine.store.index.used > 30 * TOKEN
        assert far.receipt(cache).kv_bytes.host_peak <= 200 * TOKEN
