"""One thread at a time uses a cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.hf.owner import Owner
from farkv.methods import InfiniGen
from tests.models import forward, make_model, make_prompt


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Return what some work returns, or raises, in a thread that has ended then."""
    found: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except CacheStateError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_the_first_to_use_it_has_it_until_it_ends_or_hands_it_over() -> None:
    owner = Owner()
    in_a_thread(owner.check)
    owner.check()  # the other one has ended
    assert owner.is_here()
    refused = in_a_thread(owner.check)
    assert isinstance(refused, CacheStateError)
    assert "'MainThread'" in str(refused)
    assert isinstance(in_a_thread(owner.hand_over), CacheStateError), "only its owner may"
    owner.hand_over()
    in_a_thread(owner.check)
    assert not copy.deepcopy(owner).is_here()


def test_a_second_thread_is_refused_and_changes_nothing() -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    with torch.no_grad(), farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        calm, cache = far.new_cache(), far.new_cache()
        for each in (calm, cache):
            forward(model, prompt, each)
        for use in (lambda: forward(model, prompt, cache), lambda: cache.crop(-1), cache.reset, cache.settle):
            assert isinstance(in_a_thread(use), CacheStateError)
        assert torch.equal(forward(model, prompt, cache), forward(model, prompt, calm))
        cache.hand_over()
        logits = in_a_thread(lambda: forward(model, prompt, cache))
        assert torch.equal(logits, forward(model, prompt, calm))


def test_a_pass_under_way_is_not_taken_back_by_another_thread() -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    with torch.no_grad(), farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        cache = far.new_cache()
        expected = forward(model, prompt, far.new_cache())
        said: list[Any] = []

        def interfere(*args: Any) -> None:
            if threading.current_thread() is threading.main_thread():
                said.append(in_a_thread(lambda: forward(model, prompt, cache)))

        hook = model.model.layers[2].register_forward_hook(interfere)
        assert torch.equal(forward(model, prompt, cache), expected)
        hook.remove()
        assert len(said) == 1
        assert isinstance(said[0], CacheStateError)
        assert cache.get_seq_length() == prompt.shape[1]


def test_caches_of_one_model_answer_in_threads_of_their_own() -> None:
    model = make_model("llama")
    prompts = [make_prompt(1, tokens=60, seed=seed)["input_ids"] for seed in (3, 4)]
    with torch.no_grad(), farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB") as far:

        def read(prompt: Any) -> Any:
            cache = far.new_cache()
            return torch.cat([forward(model, ids, cache) for ids in prompt.split([50, *[1] * 10], 1)], 1)

        expected = [read(prompt) for prompt in prompts]
        found: dict[int, Any] = {}

        def work(i: int) -> None:
            torch.set_grad_enabled(False)
            found[i] = read(prompts[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in (0, 1):
            assert torch.equal(found[i], expected[i])


def test_a_handed_over_cache_has_no_open_pass() -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        cache = far.new_cache()
        expected = forward(model, prompt, far.new_cache())
        hook = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            forward(model, prompt, cache)
        hook.remove()
        cache.hand_over()
        assert torch.equal(in_a_thread(lambda: forward(model, prompt, cache)), expected)
