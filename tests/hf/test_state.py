"""Layers left to Hugging Face: what they hold goes into a session and back, and a text's last tokens can be unread."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

import farkv
from farkv.errors import SessionError
from farkv.hf.ask import Listener, prefill
from farkv.hf.session import load_cache, resume
from farkv.hf.state import MOST_SHARED, SlidingLayer
from farkv.methods import Full, InfiniGen
from tests.models import forward, make_model, make_prompt, plain_cache

WINDOW = 16
SLIDING = ["gemma2", "gemma3", "gpt_oss", "llama4"]
STATES = ["lfm2", "qwen3_next"]


def rows_of(start: int, n: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of tokens, the same for the same tokens."""
    keys = torch.arange(start, start + n).float().view(1, 1, n, 1).expand(batch, 2, n, 4).contiguous()
    return keys, -keys


def read(layer: Any, sizes: list[int], start: int = 0) -> list[Any]:
    """Feed passes of these sizes; return what attention gets in each, and the mask's sizes."""
    seen = []
    for n in sizes:
        seen.append(layer.get_mask_sizes(n))
        seen += [rows.clone() for rows in layer.update(*rows_of(start, n))]
        start += n
    return seen


def assert_same(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("sizes", [[5, 1, 1], [15, 1, 1], [16, 1, 3], [40, 1, 1], [7, 30, 2, 1, 9], [1] * 40])
def test_a_window_gives_what_hugging_faces_gives_and_steps_back(sizes: list[int]) -> None:
    mine, theirs = SlidingLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
    assert_same(read(mine, sizes), read(theirs, sizes))
    assert mine.keys is not None
    assert theirs.keys is not None
    assert torch.equal(mine.keys, theirs.keys)
    n_tokens = sum(sizes)
    for n in range(1, min(MOST_SHARED, n_tokens - 1) + 1):
        stepped, fresh = copy.deepcopy(mine), DynamicSlidingWindowLayer(WINDOW)
        stepped.crop(-n)
        fresh.update(*rows_of(0, n_tokens - n))
        assert stepped.get_seq_length() == n_tokens - n
        assert_same(read(stepped, [1, 4, 1], n_tokens - n), read(fresh, [1, 4, 1], n_tokens - n))


def test_a_window_steps_back_no_further_than_it_holds() -> None:
    layer = SlidingLayer(WINDOW)
    read(layer, [50])
    layer.crop(-10)
    with pytest.raises(RuntimeError, match="at most the 6 tokens"):
        layer.crop(-7)
    layer.crop(-6)
    assert layer.get_seq_length() == 34
    # Below the window everything is there.
    short = SlidingLayer(WINDOW)
    read(short, [14])
    short.crop(-13)
    assert short.get_seq_length() == 1
    layer.reset()
    assert layer.older is None
    assert_same(read(layer, [30, 1]), read(DynamicSlidingWindowLayer(WINDOW), [30, 1]))


def test_a_window_follows_the_batch() -> None:
    one = SlidingLayer(WINDOW)
    one.update(*rows_of(0, 40))
    one.batch_repeat_interleave(3)
    one.reorder_cache(torch.tensor([2, 1, 0]))
    one.batch_select_indices(torch.tensor([0, 1]))
    one.crop(-5)
    many = SlidingLayer(WINDOW)
    many.update(*rows_of(0, 35, batch=2))
    assert one.keys is not None
    assert many.keys is not None
    assert torch.equal(one.keys, many.keys)
    # What Hugging Face records to step back by itself is its own.
    one.activate_past_recording()
    one.update(*rows_of(35, 4, batch=2))
    assert one.older is None
    one.crop(-2)
    assert one.get_seq_length() == 37


def ask(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Read what a cache does not hold of some tokens; return the last logits."""
    return forward(model, tokens[:, cache.get_seq_length() :], cache)[:, -1]


@pytest.mark.parametrize("family", [*SLIDING, *STATES])
def test_a_question_may_change_a_texts_last_tokens(family: str, tmp_path: Path) -> None:
    model, path = make_model(family, max_position_embeddings=1024), tmp_path / "a"
    text, others = make_prompt(1, tokens=70)["input_ids"], make_prompt(1, tokens=20, seed=5)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache()
        prefill(far, cache, text[0].tolist(), 32, Listener(), marks=True)
        cache.save(path)
        for n in (0, 1, 2, 7, MOST_SHARED):
            tokens = torch.cat([text[:, : 70 - n], others], 1)
            cache = load_cache(path, model)
            resume(cache, tokens[0].tolist())
            assert cache.get_seq_length() == (70 - MOST_SHARED if n and family in STATES else 70 - n)
            plain = ask(model, plain_cache(model), tokens)
            torch.testing.assert_close(ask(model, cache, tokens), plain, atol=5e-5, rtol=0)
        # What was read on from there is saved in its turn, and can step back as far as it holds.
        cache.save(path)
        cache = load_cache(path, model)
        assert cache.get_seq_length() == 74
        with pytest.raises(SessionError, match="differ at 20"):
            resume(load_cache(path, model), text[0, :20].tolist())


@pytest.mark.parametrize("family", STATES)
def test_states_that_were_not_noted_are_named(family: str, tmp_path: Path) -> None:
    model, path = make_model(family), tmp_path / "a"
    tokens = make_prompt(1, tokens=40)["input_ids"]
    with farkv.attach(model, Full()) as far:
        forward(model, tokens[:, :30], cache := far.new_cache())
        cache.save(path)
        resume(cache := load_cache(path, model), tokens[0].tolist())
        plain = plain_cache(model)
        forward(model, tokens[:, :30], plain)
        assert torch.equal(ask(model, cache, tokens), ask(model, plain, tokens))
        with pytest.raises(SessionError, match=r"last 1 tokens.*cache.mark"):
            resume(load_cache(path, model), tokens[0, :29].tolist())
        # Noted too late for this question.
        forward(model, tokens[:, :25], cache := far.new_cache())
        cache.mark()
        forward(model, tokens[:, 25:30], cache)
        cache.save(path)
        resume(cache := load_cache(path, model), tokens[0, :27].tolist())
        assert cache.get_seq_length() == 25
        with pytest.raises(SessionError, match="last 6 tokens"):
            resume(load_cache(path, model), tokens[0, :24].tolist())


def test_a_mark_is_of_one_sequence_of_tokens() -> None:
    model = make_model("lfm2")
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache()
        cache.mark()
        assert cache.marked is None
        forward(model, make_prompt(1, tokens=10)["input_ids"], cache)
        cache.mark()
        before = list_states(cache)
        forward(model, make_prompt(1, tokens=3)["input_ids"], cache)
        assert all(map(torch.equal, before, list_states(cache))), "states are written in place"
        cache.reorder_cache(torch.tensor([0]))
        assert cache.marked is None


def list_states(cache: Any) -> list[torch.Tensor]:
    """Return copies of the states that were noted."""
    return [state.clone() for states in cache.marked.states.values() for state in states.values()]
