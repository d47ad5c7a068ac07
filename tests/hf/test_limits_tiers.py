"""Promise 2 over every combination of tiers: no limit is passed, ledgers say what is allocated, refusals come first."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import farkv
from farkv.errors import CapacityError
from farkv.methods import Full, InfiniGen, Method, Oracle, Random, Window
from farkv.store.far import pages as pages_module
from farkv.store.far.eviction import POLICIES
from tests.hf.test_limits import LAYERS, TOKEN, index_tensors, tiny
from tests.models import VOCAB
from tests.store.far.test_page_cache import check_copies
from tests.store.test_stateful import count_bytes, count_host, count_near

NEW, PAGE_TOKENS = 3, 8
METHODS: dict[str, Method] = {
    "ours": InfiniGen(fraction=0.3),
    "paper": InfiniGen(fraction=0.7, paper=True),
    "full": Full(),
    "window": Window(fraction=0.3),
    "random": Random(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
}


def check_ledgers(cache: Any, options: dict[str, Any]) -> None:
    """What is allocated is what the ledgers say, and the peaks are within the limits."""
    engine = cache.engine
    store, policy = engine.store, engine.parts.eviction.policy
    index = count_bytes(index_tensors(engine))
    uses = 0 if policy is None else count_bytes([each.rows.data for each in policy.uses.values()])
    near = count_near(store) + index + (uses if store.is_far else 0)
    assert store.near.used == near
    host = count_host(store) + (0 if store.is_far else uses)
    assert store.host.used == host + (near if store.shares_host else 0)
    assert store.near.peak <= (store.near.limit or store.near.peak)
    assert store.host.peak <= (store.host.limit or store.host.peak)
    if store.page_cache is not None:
        check_copies(store.page_cache)
        disk = store.limits.disk
        assert disk is None or disk.ledger.used == store.disk_bytes <= (disk.ledger.limit or store.disk_bytes)
    assert len({store.seen(i) for i in range(LAYERS)}) == 1, "half a token was stored"


def run(model: Any, far: Any, cache: Any, ids: torch.Tensor, options: dict[str, Any], chunk: int) -> None:
    for start in range(0, ids.shape[1] - NEW, chunk):
        model(input_ids=ids[:, start : min(start + chunk, ids.shape[1] - NEW)], past_key_values=cache)
        check_ledgers(cache, options)
    for token in ids[:, -NEW:].split(1, 1):
        model(input_ids=token, past_key_values=cache)
        check_ledgers(cache, options)


def attempt(method: str, ids: torch.Tensor, options: dict[str, Any], chunk: int, *, reserve: bool) -> bool:
    """Read a context under limits; return whether it was done, having checked what must hold either way."""
    model, (batch, n_tokens) = tiny(), ids.shape
    with farkv.attach(model, METHODS[method], **options) as far:
        try:
            cache = far.new_cache(tokens=n_tokens if reserve else 0, batch=batch)
        except CapacityError as error:
            assert "raise --" in str(error)
            return False
        try:
            if reserve:
                chunk = cache.engine.parts.admission.fit_chunk(chunk)
            run(model, far, cache, ids, options, chunk)
        except CapacityError as error:
            assert "raise --" in str(error)
            check_ledgers(cache, options)
            assert not reserve or cache.get_seq_length() == 0, f"refused only after the prompt was read: {error}"
            return False
    return True


def size(low: int, high: int) -> st.SearchStrategy[int | None]:
    """Draw a limit between two shares, in sixteenths, of the whole context; or none."""
    return st.none() | st.integers(low, high)


CASES = {
    "method": st.sampled_from(sorted(METHODS)),
    "near": size(4, 48),
    "host": size(4, 48),
    "disk": size(8, 24),
    "evict": st.sampled_from(["refuse", *POLICIES]),
    "quant": st.sampled_from([None, None, "int8", "int4"]),
    "chunk": st.sampled_from([8, 17, 40, 200]),
    "batch": st.integers(1, 2),
    "n_tokens": st.integers(NEW + 2, 60),
    "reserve": st.booleans(),
}


def check_case(case: dict[str, Any]) -> bool:
    """Attempt what a case says, on pages of a few tokens."""
    near, host, disk, n_tokens = (case[name] for name in ("near", "host", "disk", "n_tokens"))
    whole = case["batch"] * (n_tokens + 16) * TOKEN
    options: dict[str, Any] = {"quant": case["quant"]}
    options |= {name: whole * n // 16 for name, n in (("near", near), ("host", host)) if n is not None}
    if host is not None:
        options["evict"] = case["evict"]
    ids = torch.randint(1, VOCAB, (case["batch"], n_tokens))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(pages_module, "PAGE_BYTES", 1 << 20)
        patch.setattr(pages_module, "MOST_TOKENS", PAGE_TOKENS)
        if disk is not None:
            options["disk"] = f"{folder}:{whole * disk // 16}"
        return attempt(case["method"], ids, options, case["chunk"], reserve=case["reserve"])


def sweep(number: int, examples: int) -> list[bool]:
    """Check as many cases as that, drawn by a seed; return which were done, and not refused."""
    done: list[bool] = []

    @seed(number)
    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=st.fixed_dictionaries(CASES))
    def check(case: dict[str, Any]) -> None:
        done.append(check_case(case))

    check()
    return done


@pytest.mark.parametrize("shard", range(8))
def test_no_limit_is_ever_passed(shard: int) -> None:
    assert set(sweep(shard, examples=16)) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(16))
def test_no_limit_is_ever_passed_by_other_cases_every_time(shard: int) -> None:
    number = random.SystemRandom().getrandbits(32)
    print(f"seed {number}")  # Shown where it fails.
    sweep(number, examples=25)
