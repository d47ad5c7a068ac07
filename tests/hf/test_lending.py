"""A `generate` without a cache is lent one: it is right, its receipt stays, its memory does not."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError, CapacityError, ConfigError
from farkv.hf.cache import FarCache
from farkv.methods import Full, InfiniGen
from tests.models import assert_same, generate, make_model, make_prompt, plain_cache

PROMPT = make_prompt(1, tokens=40)


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "guesses", "samples"],
)
def test_it_equals_the_plain_model(family: str, near: str | None, options: Any) -> None:
    model = make_model(family)
    torch.manual_seed(0)
    plain = generate(model, PROMPT, **options)
    with farkv.attach(model, Full(), near=near) as far:
        torch.manual_seed(0)
        ours = generate(model, PROMPT, **options)
        receipt = far.receipt()
    assert_same(ours, plain)
    assert isinstance(ours.past_key_values, FarCache)
    assert (receipt.method, receipt.generated_tokens, receipt.read_fraction) == ("full", 6, 1.0)


def test_a_padded_batch_reads_what_it_reads_with_a_cache_of_its_own() -> None:
    model, prompt = make_model("llama"), make_prompt(3, tokens=40, pad=9)
    with farkv.attach(model, InfiniGen(fraction=0.2)) as far:
        given = generate(model, prompt, far.new_cache())
        expected = far.receipt()
        lent = generate(model, prompt)
        receipt = far.receipt()
    assert_same(lent, given)
    assert 0 < receipt.read_fraction == expected.read_fraction <= 0.2


def test_every_call_is_a_text_of_its_own() -> None:
    model, other = make_model("llama"), make_prompt(1, tokens=30, seed=5)
    plain = [generate(model, prompt, n=n).sequences for prompt, n in ((PROMPT, 4), (other, 5))]
    with farkv.attach(model, Full()) as far:
        first = model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
        one = far.receipt()
        second = model.generate(**other, max_new_tokens=5, do_sample=False)
        two = far.receipt()
        assert torch.equal(first, plain[0])
        assert torch.equal(second, plain[1])
        far.new_cache()
        assert far.receipt().context_tokens == 0, "the newest cache is another"
    assert (one.generated_tokens, one.context_tokens) == (4, 43)
    assert (two.generated_tokens, two.context_tokens) == (5, 34)


def test_its_memory_is_there_for_the_next_call() -> None:
    model, caches = make_model("llama"), []
    # One context fits, two do not.
    with farkv.attach(model, Full(), host="48KiB") as far:
        for _ in range(3):
            model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
            assert far.setting.limits.shared.host.used == 0
        kept = generate(model, PROMPT, n=4)
        caches.append(weakref.ref(kept.past_key_values))
        with pytest.raises(CapacityError):
            generate(model, PROMPT, n=4)
        del kept
        gc.collect()
        assert caches[0]() is None, "who keeps the output keeps the cache"
        generate(model, PROMPT, n=4)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = make_model("llama")
    with farkv.attach(model, Full(), host="48KiB") as far:
        with pytest.raises(CapacityError):
            model.generate(**make_prompt(1, tokens=200), max_new_tokens=4, do_sample=False)
        gc.collect()
        model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
        assert far.receipt().generated_tokens == 4


def test_a_cache_that_is_given_is_used() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.2)) as far:
        cache = plain_cache(model)
        out = generate(model, PROMPT, cache)
        assert out.past_key_values is cache
        with pytest.raises(CacheStateError, match="no cache was made"):
            far.receipt()


def test_who_wants_none_gets_none_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    plain = generate(model, PROMPT, use_cache=False)
    with farkv.attach(model, InfiniGen(fraction=0.2)), caplog.at_level(logging.WARNING, "farkv"):
        assert_same(generate(model, PROMPT, use_cache=False), plain)
    assert "nothing is managed" in caplog.text


def test_a_cache_of_another_kind_is_refused() -> None:
    model = make_model("llama")
    with (
        farkv.attach(model, InfiniGen(fraction=0.2)),
        pytest.raises(ConfigError, match=r"cache_implementation='static'.*every_generate=False"),
    ):
        generate(model, PROMPT, cache_implementation="static")


def test_it_can_be_switched_off() -> None:
    model = make_model("llama")
    plain = generate(model, PROMPT)
    with farkv.attach(model, InfiniGen(fraction=0.2), every_generate=False) as far:
        out = generate(model, PROMPT)
        assert_same(out, plain)
        assert not isinstance(out.past_key_values, FarCache)
        with pytest.raises(CacheStateError, match="no cache was made"):
            far.receipt()
    with pytest.raises(ConfigError, match="every_generate"):
        farkv.attach(model, every_generate="yes")  # type: ignore[arg-type]


def test_detached_it_is_as_it_was() -> None:
    model = make_model("llama")
    with farkv.attach(model, InfiniGen(fraction=0.2)):
        pass
    assert not isinstance(generate(model, PROMPT).past_key_values, FarCache)
